"""Sizes of images are remembered, and tell what has changed."""

import numpy as np
import pytest
from PIL import Image

from moco_dist.data.sources import find_images
from moco_dist.datasets import measured
from moco_dist.datasets.measured import NAME, read_measured
from moco_dist.datasets.pack import pack
from moco_dist.datasets.prepare import prepare_imagefolder, verify
from moco_dist.errors import Preempted


@pytest.fixture
def root(tmp_path):
    """Four images, each of another width; verified once."""
    for i, name in enumerate(("cat/é.jpg", "cat/b.png", "dog/c.jpg", "d.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (10 + i, 8)).save(tmp_path / name)
    assert read_measured(tmp_path / NAME) is None
    assert verify(tmp_path) == []
    return tmp_path


def test_sizes_are_those_of_their_images(root):
    known = read_measured(root / NAME)
    assert known.paths == find_images(root, "train").paths == ["cat/b.png", "cat/é.jpg", "d.jpg", "dog/c.jpg"]
    assert known.sizes[:, 1:].tolist() == [[11, 8], [10, 8], [13, 8], [12, 8]]
    assert known.sizes[:, 0].tolist() == [(root / path).stat().st_size for path in known.paths]


def test_every_change_is_named(root):
    Image.new("RGB", (99, 8)).save(root / "d.jpg")
    (root / "cat" / "b.png").rename(root / "cat" / "new.png")
    (root / "dog" / "c.jpg").write_bytes(b"")
    reasons = [line.partition(f"{root}/")[2].partition(":")[0] for line in verify(root)]
    assert sorted(reasons) == ["cat/b.png is missing", "cat/new.png is new", "d.jpg has changed", "dog/c.jpg"]
    assert "cat/new.png" not in read_measured(root / NAME).paths  # a damaged set is not remembered as it is


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off", None])
def test_a_damaged_file_is_none_and_made_anew(root, content):
    file = root / NAME
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    assert read_measured(root / NAME) is None
    assert verify(root) == []
    assert read_measured(root / NAME) is not None


def test_objects_are_not_unpickled(root):
    np.savez(root / NAME, paths=np.array([object()]), sizes=np.zeros((1, 3)))
    assert read_measured(root / NAME) is None


@pytest.fixture
def decoded(monkeypatch):
    """Numbers of the images that were decoded; as many as `.allowed`, then Ctrl-C."""

    class Decoded(list):
        allowed = 10**6

    numbers, original = Decoded(), measured.image_reader

    def reader(found):
        read = original(found)

        def counted(i):
            numbers.append(i)
            return read(i)

        return counted

    def one_by_one(do, count, what):
        for i in range(count):
            if i == numbers.allowed:
                raise KeyboardInterrupt
            do(i)

    monkeypatch.setattr(measured, "image_reader", reader)
    monkeypatch.setattr(measured, "in_threads", one_by_one)
    return numbers


@pytest.mark.parametrize("form", ["verify", "verify a packed file", "prepare"])
def test_what_was_decoded_before_an_end_is_not_decoded_again(root, tmp_path_factory, decoded, form):
    out = tmp_path_factory.mktemp("out")
    files = pack(root, out / "packed.beton") if "packed" in form else root
    before = {path.name for path in root.iterdir()}
    work = (lambda: prepare_imagefolder(out / "new", root)) if form == "prepare" else lambda: verify(files)
    decoded.allowed = 3
    with pytest.raises(Preempted, match="3 of 4 images are decoded"):
        work()
    if form == "prepare":
        assert {path.name for path in root.iterdir()} == before  # the source stays as it is
    decoded.clear()
    decoded.allowed = 10**6
    result = work()
    assert decoded == [3]
    assert result == ([] if form != "prepare" else out / "new")
    assert not [*out.glob(".*"), *(path for path in root.iterdir() if path.name not in before)]


def test_an_image_that_has_changed_since_is_decoded_again(root, decoded):
    decoded.allowed = 3
    with pytest.raises(Preempted):
        verify(root)
    (root / "cat" / "b.png").write_bytes(b"no image")
    decoded.allowed = 10**6
    (line,) = verify(root)
    assert "cat/b.png: not an image" in line
    assert 0 in decoded


def test_where_nothing_can_be_kept_nothing_is_promised(root, decoded, monkeypatch):
    monkeypatch.setattr(measured, "write_measured", lambda *_: None)
    decoded.allowed = 3
    with pytest.raises(KeyboardInterrupt):
        verify(root)
