"""Tar shards: the same list and bytes as the folder they were made of, whatever the layout; and the index of them."""

import pickle
import shutil
import tarfile
import zlib

import numpy as np
import pytest

from moco_dist.data.images import NO_CLASS, subset
from moco_dist.data.mapped import MappedArray
from moco_dist.data.sources import bytes_reader, find_images, find_splits
from moco_dist.data.storage import PlacedFile
from moco_dist.data.tar import index
from moco_dist.data.tar.layout import expand
from moco_dist.data.tar.source import TarShards
from moco_dist.datasets.pack import pack
from moco_dist.errors import UserError
from tests.tars import files_of, link, with_labels, write_tar
from tests.unit.loaders import assert_same, batches_of, config_of, picture

LONG = "long_" * 40  # more than the 100 characters that a header has room for


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """ROOT/train/CLASS and ROOT/val/CLASS, 16 and 5 JPEGs in three classes; one name is long, one no ASCII."""
    root = tmp_path_factory.mktemp("photos") / "set"
    for i in range(21):
        name = {3: f"{LONG}{i:02d}", 4: f"{i:02d}_é"}.get(i, f"{i:02d}")
        path = root / ("val" if i % 4 == 3 else "train") / f"class_{i % 3}" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 60 + i, 70).save(path)
    return root


def cut(files, parts):
    """Shuffled into so many shards."""
    order = np.random.default_rng(0).permutation(len(files))
    return [[files[i] for i in order[part::parts]] for part in range(parts)]


def shards_beside(photos, out, make=lambda files: files, name="set"):
    for split, word in (("train", "train"), ("val", "validation")):
        for i, part in enumerate(cut(files_of(photos / split), 2)):
            write_tar(out / f"{name}-{word}-{i:04d}.tar", make(part))
    return out


def by_labels(suffix):
    """The numbers have to be those of all classes, though a shard may lack some."""

    def layout(photos, out):
        for split in ("train", "val"):
            members = with_labels(files_of(photos / split), suffix)
            write_tar(out / f"{split}-0.tar", members[:8])
            write_tar(out / f"{split}-1.tar", members[8:])
        return out

    return layout


def posix(photos, out):
    for split in ("train", "val"):
        write_tar(out / f"{split}.tar", files_of(photos / split), tarfile.PAX_FORMAT)
    return out


def in_split_folders(photos, out):
    for split, folder in (("train", "train"), ("val", "validation")):
        for i, part in enumerate(cut(files_of(photos / split), 3)):
            write_tar(out / folder / f"{i}.tar", part)
    return out


def one_file(photos, out):
    return write_tar(out / "set.tar", [(f"./set/{name}", content) for name, content in files_of(photos)])


def folders_above(photos, out):
    """As `tar -P` stores a whole path, and Python one that begins with `..`."""
    return write_tar(out / "x.tar", [(f"/../data/my sets/{name}", content) for name, content in files_of(photos)])


def pattern(photos, out):
    return shards_beside(photos, out) / "set-train-{0000..0001}.tar"


def both_patterns(photos, out):
    shards_beside(photos, out)
    write_tar(out / "other.tar", [("x.txt", b"")])
    return out / "set-{train,validation}-{0000..0001}.tar"


def tar_of_tars(photos, out):
    for split in ("train", "val"):
        inner = []
        for name in sorted(path.name for path in (photos / split).iterdir()):
            path = write_tar(out / "inner" / f"{name}.tar", files_of(photos / split / name))
            inner.append((path.name, path.read_bytes()))
        write_tar(out / f"ILSVRC_img_{split}.tar", inner)
    shutil.rmtree(out / "inner")
    return out


def noise(files):
    """What archivers and people put among the images."""
    (name, content), *rest = files
    return [
        ("._" + name, b"no image"), (f"__MACOSX/{name}", b"no image"), (f"class_0/._{name[8:]}", b"no image"),
        ("README.md", b"text"), (name, b"an older version"), *((f"./{n}", c) for n, c in rest), (name, content),
        link("class_0/folder.jpg", "", tarfile.DIRTYPE),
    ]  # fmt: skip


LAYOUTS = {
    "shards beside one another": shards_beside,
    "POSIX names": posix,
    "folders of shards": in_split_folders,
    "one file of both splits": one_file,
    "a whole path in each name": folders_above,
    "a pattern of training shards": pattern,
    "a pattern of both": both_patterns,
    "a tar of tars": tar_of_tars,
    "what else there is": lambda photos, out: shards_beside(photos, out, noise),
    "numbers in .cls": by_labels("cls"),
    "numbers in .json": by_labels("json"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_list_and_the_bytes_are_the_folder_s(photos, tmp_path, layout):
    found, folder = find_splits(LAYOUTS[layout](photos, tmp_path / "tars")), find_splits(photos)
    assert list(found) == ["train", "val"]
    for split, ours in found.items():
        reference = folder[split]
        assert ours.labels.tolist() == reference.labels.tolist()
        assert ours.content_hash == reference.content_hash
        if not layout.startswith("numbers"):
            assert ours.paths == reference.paths and ours.classes == reference.classes
            assert ours.list_hash == reference.list_hash
        read, read_file = bytes_reader(ours), bytes_reader(reference)
        assert [read(i)[0] for i in range(len(ours.paths))] == [read_file(i)[0] for i in range(len(reference.paths))]


def test_names_beside_the_shards_make_classes_of_numbers(photos, tmp_path):
    root = by_labels("cls")(photos, tmp_path)
    (root / "classes.txt").write_text("class_0\nclass_1\nclass_2\n")
    found, folder = find_images(root, "val"), find_images(photos, "val")
    assert found.paths == folder.paths and found.classes == folder.classes


def test_labels_that_are_names_and_one_that_is_missing(photos, tmp_path):
    content = files_of(photos / "train")[0][1]
    members = [
        ("a.jpg", content),
        ("a.cls", b"dog\n"),
        ("b.jpg", content),
        ("c.jpg", content),
        ("c.json", b'{"label": "cat"}'),
    ]
    found = find_images(write_tar(tmp_path / "x.tar", members), "train")
    assert found.classes == ("cat", "dog") and found.paths == ["b.jpg", "cat/c.jpg", "dog/a.jpg"]
    assert found.labels.tolist() == [NO_CLASS, 0, 1]


def test_names_that_begin_anew_in_each_shard_are_told_apart(photos, tmp_path):
    files = files_of(photos / "train")
    for shard in range(2):
        write_tar(tmp_path / f"train-{shard}.tar", [(f"c/{i}.jpg", files[2 * i + shard][1]) for i in range(3)])
    assert find_images(tmp_path, "train").paths == [f"c/train-{shard}/{i}.jpg" for shard in range(2) for i in range(3)]


def test_a_second_name_of_a_file_is_read(photos, tmp_path):
    (name, content), *_ = files_of(photos / "train")
    root = write_tar(tmp_path / "x.tar", [(name, content), link("class_2/twin.jpg", f"./{name}", tarfile.LNKTYPE)])
    found = find_images(root, "train")
    assert [bytes(bytes_reader(found)(i)[0]) for i in range(2)] == [content, content]


def test_archives_among_images_do_not_make_a_folder_one_of_shards(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "set")
    write_tar(root / "ILSVRC2012_img_train.tar", files_of(photos / "train"))
    write_tar(root / "train" / "extra.tar", [])
    assert find_images(root, "train").places is None


def test_views_are_the_folder_s_and_the_packed_file_s(photos, tmp_path):
    tars = shards_beside(photos, tmp_path / "tars")
    reference = batches_of(config_of(photos, "torchvision"))
    assert_same(batches_of(config_of(tars, "torchvision")), reference)
    assert_same(batches_of(config_of(tars, "torchvision", num_workers=2)), reference)
    assert_same(batches_of(config_of(pack(tars, tmp_path / "x.beton"), "ffcv")), reference)


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_compressed_shards_are_packed(photos, tmp_path, kind):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar.{kind}", f"w:{kind}") as tar:
            tar.add(photos / split, ".")
    packed, folder = find_splits(pack(tmp_path, tmp_path / "out" / "x.beton")), find_splits(photos)
    assert all(packed[split].paths == folder[split].paths for split in ("train", "val"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.beton"]


@pytest.mark.parametrize("loader", ["dali", "ffcv"])
def test_other_loaders_say_what_reads_shards(photos, tmp_path, loader):
    with pytest.raises(UserError, match=r"tar shards, which torchvision reads; .*moco-dist data pack"):
        batches_of(config_of(shards_beside(photos, tmp_path), loader))


@pytest.fixture
def large(photos, tmp_path, monkeypatch):
    """Any number of images is large."""
    monkeypatch.setattr(index, "MIN_IMAGES", 1)
    return shards_beside(photos, tmp_path / "tars")


def fresh(root, *args, **more):
    """As another process finds it."""
    index._known_or_made.cache_clear()
    return find_images(root, *args, **more)


def test_the_index_is_written_mapped_and_believed(large, monkeypatch):
    made = fresh(large, "train")
    assert [path.name[:15] for path in large.iterdir() if path.suffix != ".tar"] == [index.NAME]
    monkeypatch.setattr(index, "read_shard", None)  # not called again
    found = fresh(large, "train")
    assert found.paths == made.paths and found.labels.tolist() == made.labels.tolist()
    assert found.content_hash == made.content_hash
    arrays = (found.labels, *found.places[2:5])
    assert all(isinstance(array, MappedArray) and array.place for array in arrays)
    sent = pickle.loads(pickle.dumps(found))
    assert sent.labels.place == found.labels.place and sent.paths == found.paths
    part = subset(found, 5)
    assert part.list_hash == subset(made, 5).list_hash and part.content_hash != found.content_hash
    assert bytes_reader(part)(4) == bytes_reader(found)(4 * len(found.paths) // 5)


def rewritten(root):
    shard = root / "set-train-0000.tar"
    members = [("class_0/new.jpg", b"content")]
    size, shard = shard.stat().st_size, write_tar(shard, members)
    assert shard.stat().st_size != size


CHANGES = {
    "a shard changed": rewritten,
    "a shard came": lambda root: write_tar(root / "set-train-0002.tar", [("class_0/new.jpg", b"x")]),
    "names of classes came": lambda root: (root / "classes.txt").write_text("a\n"),
    "the index was cut off": lambda root: [
        path.write_bytes(path.read_bytes()[:-8]) for path in root.glob(".moco*")
    ],
    "the index is something else": lambda root: [path.write_text("{}") for path in root.glob(".moco*")],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_index_is_not_believed_when(large, monkeypatch, change):
    fresh(large, "train")
    read = []
    CHANGES[change](large)
    monkeypatch.setattr(index, "read_shard", lambda path, real=index.read_shard: read.append(path) or real(path))
    fresh(large, "train")
    assert len(read) == len(list(large.glob("*.tar")))


def test_the_index_of_what_cannot_be_written_lies_elsewhere(large, tmp_path, monkeypatch):
    real = index.write_whole

    def write(path, content):
        if path.parent == large:
            raise PermissionError
        real(path, content)

    monkeypatch.setattr(index, "write_whole", write)
    made = fresh(large, "train", index_folder=tmp_path / "run")
    monkeypatch.setattr(index, "read_shard", None)
    assert fresh(large, "train", index_folder=tmp_path / "run").list_hash == made.list_hash


def test_headers_are_read_by_processes_where_shards_are_large(large, monkeypatch):
    alone = fresh(large, "train")
    for path in large.glob(".moco*"):
        path.unlink()
    monkeypatch.setattr(index, "SMALL_BYTES", 0)
    assert fresh(large, "train").list_hash == alone.list_hash


def test_few_files_are_open_at_a_time(photos, tmp_path):
    for i, member in enumerate(files_of(photos / "train")):
        write_tar(tmp_path / f"{i:02d}.tar", [member])
    found = find_images(tmp_path, "train")
    source = TarShards(found)
    source._most_opened = 3
    contents = [bytes(source.content(i)[0]) for i in range(len(found.paths))]
    assert [zlib.crc32(c) for c in contents] == [zlib.crc32(c) for _, c in files_of(photos / "train")]
    assert len(source._opened) == 3


def test_a_shard_that_changes_under_a_run_is_named(photos, tmp_path):
    root = shards_beside(photos, tmp_path)
    found = find_images(root, "train")
    for shard in root.glob("*.tar"):
        write_tar(shard, [("class_0/x.jpg", b"other")])
    with pytest.raises(UserError, match=r"cannot read image class_0/00\.jpg in .*\.tar: the file has changed since"):
        TarShards(found).content(0)


def test_a_placed_file_that_ends_early_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert PlacedFile(tmp_path / "x").read(1, 2) == b"bc"
    with pytest.raises(OSError, match="ends before it"):
        PlacedFile(tmp_path / "x").read(1, 3)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a-{08..11}", ["a-08", "a-09", "a-10", "a-11"]),
        ("{0..2}{x,y}", ["0x", "0y", "1x", "1y", "2x", "2y"]),
        ("{a-{1..2},b}.tar", ["a-1.tar", "a-2.tar", "b.tar"]),
        ("plain", ["plain"]),
    ],
)
def test_patterns_are_a_shell_s(text, names):
    assert expand(text) == names
