"""Packed files: what is in them, what is left out, and FFCV's own package as the other reader and writer."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.data.beton import JPEG, RAW, BetonWriter, read_beton
from moco_dist.data.decode import decode_image
from moco_dist.data.images import NO_CLASS, rows_of, subset
from moco_dist.data.packed import PackedFile, splits_of
from moco_dist.data.sources import find_images
from moco_dist.data.tasks import Crop
from moco_dist.datasets.pack import pack
from moco_dist.errors import UserError


def picture(seed, width=40, height=30):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def images(tmp_path):
    """Three classes, one of them not in val; an image without a class; one PNG and one that cannot be read."""
    root = tmp_path / "set"
    for i, path in enumerate(["train/ant/0.jpg", "train/bee/1.jpg", "train/cow/2.jpg", "train/x.jpg", "val/cow/3.jpg"]):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(root / path)
    picture(9, 100, 50).save(root / "train/cow/ä.png")
    (root / "train/bee/bad.jpg").write_bytes(b"no")
    return root


def content(beton, row):
    return beton.content[beton.start[row] : beton.start[row] + beton.size[row]].tobytes()


def test_images_are_copied_as_they_are_and_found_as_in_the_folder(images, tmp_path, capsys):
    out = pack(images, tmp_path / "x.beton")
    assert "6 images" in capsys.readouterr().out
    beton = read_beton(out)
    assert beton.names == sorted(beton.names)
    assert content(beton, beton.names.index("train/bee/1.jpg")) == (images / "train/bee/1.jpg").read_bytes()
    listed = (tmp_path / "x.beton.unreadable.txt").read_text()
    assert listed == f"cannot read image {images}/train/bee/bad.jpg: not an image\n"
    (images / "train/bee/bad.jpg").unlink()
    for split in ("train", "val"):
        packed, folder = find_images(out, split), find_images(images, split)
        assert (packed.root, packed.paths, packed.classes) == (out / split, folder.paths, folder.classes)
        assert packed.labels.tolist() == folder.labels.tolist()
    assert NO_CLASS in find_images(out, "train").labels


def test_splits_and_classes_in_any_order_are_those_of_a_plain_reading(tmp_path):
    """By (number, name): two classes may have a number, a class may be of one split alone, an image of none."""
    names = ["val/yak/9.jpg", "train/zoo/0.jpg", "train/ant/1.jpg", "train/2.jpg", "train/zoo/sub/3.jpg",
             "train/bee/4.jpg", "other/ant/5.jpg", "6.jpg", "val/ant/7.jpg", "train/ant/8.jpg"]  # fmt: skip
    labels = [3, 0, 5, -1, 0, 5, 7, -1, 5, 9]  # a class has the number of its first image
    with (tmp_path / "x.beton").open("wb") as file, BetonWriter(file, 16) as writer:
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            writer.add(name, label, RAW, 1, 1, bytes([number] * 3))
    classes = ("zoo", "yak", "ant", "bee")
    for split in ("train", "val"):
        rows = [row for row, name in enumerate(names) if name.startswith(f"{split}/")]
        paths = [names[row].removeprefix(f"{split}/") for row in rows]
        found = find_images(tmp_path / "x.beton", split)
        assert (list(found.paths), found.classes) == (paths, classes)
        assert found.labels.tolist() == [classes.index(p.partition("/")[0]) if "/" in p else NO_CLASS for p in paths]
        chosen = rows_of(found, np.arange(len(rows))[::-1])
        images = [PackedFile(chosen).image(i)[1].getpixel((0, 0))[0] for i in range(len(rows))]
        assert images == rows[::-1]
    assert list(splits_of(read_beton(tmp_path / "x.beton"), tmp_path / "x.beton")) == ["val", "train"]


def test_the_table_of_places_may_have_any_order(images, tmp_path):
    out = pack(images, tmp_path / "x.beton")
    written, before = bytearray(out.read_bytes()), read_beton(out)
    at = int(np.frombuffer(written, "<u8", 1, 16)[0])  # the last of the header
    table = np.frombuffer(written, "<u8", offset=at).reshape(-1, 3)
    written[at:] = table[::-1].tobytes()
    (tmp_path / "y.beton").write_bytes(written)
    after = read_beton(tmp_path / "y.beton")
    assert after.size.tolist() == before.size.tolist()
    assert len(set(after.size.tolist())) > 1


@pytest.mark.parametrize("raw_share", [0.0, 1.0])
def test_a_side_that_no_field_of_the_file_can_hold_costs_that_image_alone(images, tmp_path, raw_share):
    picture(1, 70_000, 1).save(images / "train/bee/long.png")
    assert len(read_beton(pack(images, tmp_path / "x.beton", raw_share=raw_share)).names) == 6
    listed = (tmp_path / "x.beton.unreadable.txt").read_text()
    assert f"cannot pack image {images}/train/bee/long.png: 70,000 x 1 pixels, and 65,500 a side are the most" in listed
    assert len(read_beton(pack(images, tmp_path / "y.beton", 64, raw_share=raw_share)).names) == 7


def test_what_is_larger_or_no_jpeg_is_encoded_anew(images, tmp_path):
    beton = read_beton(pack(images, tmp_path / "x.beton", max_side=36, quality=100))
    row = beton.names.index("train/cow/ä.png")
    assert (beton.mode[row], beton.width[row], beton.height[row]) == (JPEG, 36, 18)
    row = beton.names.index("train/ant/0.jpg")
    assert (beton.width[row], beton.height[row]) == (36, 27)
    assert decode_image(content(beton, row), "").size == (36, 27)


def test_a_share_is_stored_as_pixels(images, tmp_path):
    out = pack(images, tmp_path / "x.beton", raw_share=1.0)
    beton = read_beton(out)
    assert set(beton.mode.tolist()) == {RAW}
    expected = np.asarray(decode_image((images / "train/ant/0.jpg").read_bytes(), ""))
    assert content(beton, beton.names.index("train/ant/0.jpg")) == expected.tobytes()
    view = PackedFile(find_images(out, "train")).cut(0, 30, lambda w, h: [Crop((5, 0, 35, 30), flip=True)])[0]
    assert (view.permute(1, 2, 0).numpy() == expected[:30, 5:35][:, ::-1]).all()


def test_a_subset_reads_its_own_images(images, tmp_path):
    part = subset(find_images(pack(images, tmp_path / "x.beton"), "train"), 2)
    source = PackedFile(part)
    for i, path in enumerate(part.paths):
        expected = np.asarray(decode_image((images / "train" / path).read_bytes(), ""))
        view = source.cut(i, 30, lambda w, h: [Crop((0, 0, 30, 30))])[0].permute(1, 2, 0).numpy()
        assert (view == expected[:30, :30]).all()


def test_images_do_not_cross_pages_and_larger_ones_start_one(images, tmp_path, monkeypatch):
    monkeypatch.setattr("moco_dist.data.beton.PAGE_BYTES", 4096)
    monkeypatch.setattr("moco_dist.datasets.pack.CHUNK", 2)
    beton = read_beton(pack(images, tmp_path / "x.beton", raw_share=0.5))
    first, last = beton.start // 4096, (beton.start + beton.size - 1) // 4096
    assert ((first == last) | ((beton.size > 4096) & (beton.start % 4096 == 0))).all()
    assert (beton.size > 4096).any()
    assert all(len(content(beton, row)) for row in range(6))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b""), "not a whole file"),
        (lambda file: file.write_bytes(b"\x02\0" + bytes(5000)), "not a whole file"),
        (lambda file: file.write_bytes(file.read_bytes()[:300_000]), "not a whole file"),
        (lambda file: file.write_bytes(b"\x07\0" + file.read_bytes()[2:]), "version 7, not 2"),
        (lambda file: file.unlink(), r"y\.beton is not a file; did you mean x\.beton"),
    ],
)
def test_files_that_are_none_are_named(images, tmp_path, damage, message):
    (tmp_path / "y.beton").write_bytes(pack(images, tmp_path / "x.beton").read_bytes())
    damage(tmp_path / "y.beton")
    with pytest.raises(UserError, match=message):
        find_images(tmp_path / "y.beton", "train")


def test_a_file_without_a_validation_set_says_so(images, tmp_path):
    with pytest.raises(UserError, match="has no validation images"):
        find_images(pack(images / "train", tmp_path / "x.beton"), "val")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out.bin"], r"out\.beton\?"),
        (["x.beton", "--quality", "0"], "--quality 0 is not between 1 and 100"),
        (["x.beton", "--raw-share", "2"], "--raw-share 2.0 is not between 0 and 1"),
        (["there.beton"], "exists; remove it"),
    ],
)
def test_mistakes_of_the_command(images, tmp_path, capsys, words, message):
    (tmp_path / "there.beton").touch()
    status = main(["data", "pack", str(images), str(tmp_path / words[0]), *words[1:]])
    assert status == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x.beton").exists()


def test_what_fails_in_the_middle_leaves_nothing(images, tmp_path, monkeypatch):
    monkeypatch.setattr("moco_dist.datasets.pack._encode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack(images, tmp_path / "x.beton")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


FFCV_PROGRAM = """
import sys
import numpy as np
from PIL import Image
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

ours, theirs, *files = sys.argv[1:]
for os_cache in (True, False):
    pipelines = {"image": [CenterCropRGBImageDecoder((30, 30), 1.0)], "path": None}
    loader = Loader(ours, batch_size=3, num_workers=1, os_cache=os_cache, order=OrderOption.SEQUENTIAL,
                    pipelines=pipelines)
    for image, label in loader:
        print("read", image.shape, label.flatten().tolist(), round(float(image.mean())))


class Images:
    def __len__(self):
        return len(files)

    def __getitem__(self, i):
        return np.array(Image.open(files[i]).convert("RGB")), i % 2


writer = DatasetWriter(theirs, {"image": RGBImageField("raw"), "label": IntField()}, num_workers=1)
writer.from_indexed_dataset(Images())
"""


@pytest.mark.slow
def test_ffcv_s_package_reads_our_files_and_we_read_its(images, tmp_path):
    """In a process of its own: importing it sets torch's threads to one, and its loader hangs on an error."""
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("needs pip install 'moco_dist[ffcv]'")
    ours, theirs = pack(images, tmp_path / "ours.beton", raw_share=0.5), tmp_path / "theirs.beton"
    files = [str(images / "train" / path) for path in find_images(ours, "train").paths]
    done = subprocess.run(
        [sys.executable, "-c", FFCV_PROGRAM, str(ours), str(theirs), *files], capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = [line for line in done.stdout.splitlines() if line.startswith("read")]
    assert len(read) == 4
    assert read[:2] == read[2:]
    assert read[0].startswith("read (3, 30, 30, 3) [0, 1, 2]")
    folder = find_images(theirs, "train")
    assert folder.classes == ("0", "1")
    source = PackedFile(folder)
    for i, file in enumerate(files):
        expected = np.asarray(Image.open(file).convert("RGB"))[:30, :30]
        view = source.cut(i, 30, lambda w, h: [Crop((0, 0, 30, 30))])[0].permute(1, 2, 0).numpy()
        assert (view == expected).all()
