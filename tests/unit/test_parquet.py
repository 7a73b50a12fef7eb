"""Parquet to a packed file: its images, their order and labels; memory; and going on after a stop."""

import os
import signal

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import pyarrow as pa
import pyarrow.parquet as pq

from moco_dist.cli.main import main
from moco_dist.config.address import Url
from moco_dist.data.beton import read_beton
from moco_dist.data.images import NO_CLASS
from moco_dist.data.sources import find_images
from moco_dist.datasets import pack as packing
from moco_dist.datasets.pack import pack
from moco_dist.datasets.parquet import parquet_splits
from moco_dist.datasets.parquet_files import find_parquet
from moco_dist.errors import Preempted, UserError
from tests.parquets import write_parquet
from tests.stores import running_store
from tests.unit.loaders import picture

CLASSES = ["tench", "goldfish", "crane", "ant/bee"]  # in no order of the alphabet


def jpeg(tmp_path, i):
    path = tmp_path / f"made_{i}.jpg"
    picture(i, 20 + i, 30).save(path)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def images(tmp_path):
    """Twenty JPEGs, the names they had, and labels."""
    made = [(jpeg(tmp_path, i), f"photo_{i}.jpg") for i in range(20)]
    return made, [3, 0, 2, 1] * 5


@pytest.fixture
def hub(tmp_path, images):
    """A repository as it is downloaded: three training files, one of validation, one of test, and a page."""
    root, (made, labels) = tmp_path / "hub", images
    for n, rows in enumerate((slice(0, 7), slice(7, 8), slice(8, 15))):
        write_parquet(root / "data" / f"train-{n:05d}-of-00003.parquet", made[rows], labels[rows], CLASSES, 3)
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", made[15:], labels[15:], CLASSES, 2)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", made[:3], [-1] * 3, CLASSES)
    (root / "README.md").write_text("a page")
    write_parquet(root / ".cache" / "x.parquet", made[:1], [0], CLASSES)
    return root


def contents(out):
    """(name, label, bytes) of each image in its order."""
    beton = read_beton(out)
    places = zip(beton.start.tolist(), beton.size.tolist(), strict=True)
    data = [beton.content[start : start + size].tobytes() for start, size in places]
    return list(zip(beton.names, beton.labels.tolist(), data, strict=True))


@pytest.mark.parametrize("chunk", [2, 5, 256])
def test_labels_and_order_are_what_the_files_say(hub, images, tmp_path, monkeypatch, capsys, chunk):
    monkeypatch.setattr(packing, "CHUNK", chunk)
    assert main(["data", "pack", str(hub), str(tmp_path / "x.beton")]) == 0
    assert "images from the column image, labels from label, 4 classes" in capsys.readouterr().out
    made, labels = images
    names = [name.replace("/", "_") for name in CLASSES]
    assert contents(tmp_path / "x.beton") == [
        (f"{'train' if i < 15 else 'val'}/{names[labels[i]]}/{path}", labels[i], data)
        for i, (data, path) in enumerate(made)
    ]
    train, val = (find_images(tmp_path / "x.beton", split) for split in ("train", "val"))
    assert train.classes == val.classes == tuple(names)
    assert train.labels.tolist() + val.labels.tolist() == labels


def test_one_file_and_a_pattern(hub, tmp_path):
    (tmp_path / "one").mkdir()
    out = pack(hub / "data" / "train-00001-of-00003.parquet", tmp_path / "one.beton")
    assert [name for name, *_ in contents(out)] == ["train/ant_bee/photo_7.jpg".replace("ant_bee", "goldfish")]
    out = pack(hub / "data" / "train-0000{0,2}-of-00003.parquet", tmp_path / "two.beton")
    assert len(contents(out)) == 14


@pytest.mark.parametrize(("labels", "kind", "classes"), [
    ([10, 2, None, -1, 2], pa.int16(), ("02", "10")),
    (["b", "a", "", None, "a"], pa.string(), ("a", "b")),
    (["a_b", "a/b", "", None, "a/b"], pa.string(), ("a_b 0", "a_b 1")),
    (["b", "a", "", None, "a"], pa.dictionary(pa.int32(), pa.string()), ("a", "b")),
    ([True, False, None, None, False], pa.bool_(), ("0", "1")),
])  # fmt: skip
def test_labels_without_names_of_classes(images, tmp_path, labels, kind, classes):
    write_parquet(tmp_path / "x.parquet", images[0][:5], labels, kind=kind)
    found = find_images(pack(tmp_path / "x.parquet", tmp_path / "x.beton"), "train")
    assert (found.classes, found.labels.tolist()) == (classes, [1, 0, NO_CLASS, NO_CLASS, 0])


def test_names_that_are_missing_or_there_twice(images, tmp_path):
    made = [(data, "image.jpg") for data, _ in images[0][:3]]
    out = pack(write_parquet(tmp_path / "x.parquet", made, [0, 0, 1], ["crane", "crane"]), tmp_path / "x.beton")
    assert [name for name, *_ in contents(out)] == [
        "train/crane 0/00000000_image.jpg", "train/crane 0/00000001_image.jpg", "train/crane 1/00000002_image.jpg",
    ]  # fmt: skip
    pq.write_table(pa.table({"picture": [data for data, _ in made]}), tmp_path / "y.parquet")
    out = pack(tmp_path / "y.parquet", tmp_path / "y.beton")
    assert [name for name, *_ in contents(out)] == [f"train/{i:08d}.jpg" for i in range(3)]
    assert find_images(out, "train").labels.tolist() == [NO_CLASS] * 3


def test_the_columns_that_are_named(images, tmp_path, capsys):
    made, _ = images
    table = pa.table({
        "img": pa.array([{"bytes": data, "path": None} for data, _ in made]),
        "thumbnail": [data for data, _ in made[::-1]],
        "fine": pa.array(range(20)), "coarse": pa.array([0, 1] * 10),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "x.parquet")
    words = ["data", "pack", str(tmp_path / "x.parquet"), str(tmp_path / "x.beton")]
    assert main(words) == 2
    assert "2 columns of images: img, thumbnail; --image-column names one" in capsys.readouterr().err
    assert main([*words, "--image-column", "thumbnail", "--label-column", "coarse"]) == 0
    assert [row[1:] for row in contents(tmp_path / "x.beton")] == [
        (i % 2, data) for i, (data, _) in enumerate(made[::-1])
    ]


def test_images_that_cannot_be_read_are_listed(images, tmp_path):
    made = [images[0][0], None, (b"no image", "a.jpg"), (None, "elsewhere.jpg")]
    out = pack(write_parquet(tmp_path / "x.parquet", made, [0, 1, 2, 3], CLASSES), tmp_path / "x.beton")
    assert len(contents(out)) == 1
    lines = (tmp_path / "x.beton.unreadable.txt").read_text().splitlines()
    rows = [f"cannot read image row {i} of {tmp_path}/x.parquet: " for i in (1, 2, 3)]
    assert lines == [f"{rows[0]}it has no bytes (null)", f"{rows[1]}not an image", f"{rows[2]}it has no bytes (null)"]


@pytest.mark.parametrize("at", [1, 9, 19])
def test_a_stopped_one_goes_on_to_the_same_file(hub, tmp_path, monkeypatch, capsys, at):
    monkeypatch.setattr(packing, "CHUNK", 4)
    whole, original, count, stops = pack(hub, tmp_path / "whole.beton"), packing._encode, [], [at]

    def counted(read, i, *options):
        count.append(i)
        if len(count) in stops:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 0.1)
        return original(read, i, *options)

    monkeypatch.setattr(packing, "_encode", counted)
    with pytest.raises(Preempted):
        pack(hub, tmp_path / "x.beton")
    count.clear()
    stops.clear()
    pack(hub, tmp_path / "x.beton")
    assert "x.beton goes on after" in capsys.readouterr().out
    assert len(count) < 20
    assert (tmp_path / "x.beton").read_bytes() == whole.read_bytes()


def other_bytes(file, images):
    """The first image is another one, of the same name."""
    write_parquet(file, [(images[19][0], images[0][1]), *images[1:]], [0] * 20, CLASSES, 3, mask=masks(images))


def masks(images):
    """A second column of images, whose names are those of the first."""
    return [{"bytes": data, "path": name} for (data, _), (_, name) in zip(images[::-1], images, strict=True)]


@pytest.mark.parametrize("column", ["image", "mask"])
def test_another_column_or_another_file_begins_anew(images, tmp_path, monkeypatch, column):
    monkeypatch.setattr(packing, "CHUNK", 4)
    made, file, original = images[0], tmp_path / "x.parquet", packing._encode
    write_parquet(file, made, [0] * 20, CLASSES, 3, mask=masks(made))

    def stops(read, i, *options):
        if i == 9:
            raise Preempted("x")
        return original(read, i, *options)

    monkeypatch.setattr(packing, "_encode", stops)
    with pytest.raises(Preempted):
        pack(file, tmp_path / "x.beton", image_column="image")
    monkeypatch.setattr(packing, "_encode", original)
    if column == "image":
        other_bytes(file, made)
    pack(file, tmp_path / "x.beton", image_column=column)
    assert contents(tmp_path / "x.beton")[0][2] == made[19][0]


def test_from_a_store_as_from_a_disk(hub, tmp_path, monkeypatch):
    expected = pack(hub, tmp_path / "local.beton").read_bytes()
    with running_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        store.put("sets")
        store.put_folder(hub / "data", "sets/hub/data")
        assert pack(Url("s3://sets/hub"), tmp_path / "s3.beton").read_bytes() == expected
        store.put_folder(hub, "sets/v1.0")
        assert pack(Url("s3://sets/v1.0"), tmp_path / "dot.beton").read_bytes() == expected
        with pytest.raises(UserError, match=r"s3://sets/hub is parquet"):
            find_images(Url("s3://sets/hub"), "train")
        with pytest.raises(UserError, match=r"s3://sets/hub/data is parquet, .* pack s3://sets/hub/data OUT\.beton"):
            find_images(Url("s3://sets/hub/data"), "train")
        names = "{train-{00000..00002}-of-00003,validation-00000-of-00001}.parquet"
        pattern = Url(f"{store.url}/sets/hub/data/{names}")
        assert pack(pattern, tmp_path / "http.beton").read_bytes() == expected


def test_splits_are_read_from_the_names_of_files_and_folders(images, tmp_path):
    made, labels = images
    for folder in ("train", "validation", "test"):
        write_parquet(tmp_path / "default" / folder / "0000.parquet", made[:2], labels[:2], CLASSES)
    found = [(file.path.parent.name, file.split) for file in find_parquet(tmp_path)]
    assert found == [("train", "train"), ("validation", "val")]


def test_a_folder_of_images_with_a_table_beside_them_is_no_parquet(images, tmp_path):
    for data, name in images[0]:
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    write_parquet(tmp_path / "metadata.parquet", images[0][:1])
    assert find_parquet(tmp_path) == []


@pytest.mark.parametrize("rows_a_group", [60, 600])
def test_memory_does_not_depend_on_the_size_of_row_groups(images, tmp_path, monkeypatch, rows_a_group):
    """Eight images of 200 kB are 1.6 MB; 600 of them, 120 MB, are in one row group here."""
    data = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    path = tmp_path / "x.parquet"
    write_parquet(path, [(images[0][0][0] + data, f"{i}.jpg") for i in range(600)], rows_a_group=rows_a_group)
    _, read = parquet_splits(find_parquet(path), None, None, 8)["train"]
    first, most = pa.total_allocated_bytes(), 0
    for i in range(600):
        assert len(read(i)[0]) > len(data)
        most = max(most, pa.total_allocated_bytes() - first)
    assert most < 12 * 2**20
