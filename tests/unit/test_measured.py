"""Sizes of images are remembered, and tell what has changed."""

import numpy as np
import pytest
from PIL import Image

from moco_dist.data.sources import find_images
from moco_dist.datasets.measured import NAME, read_measured
from moco_dist.datasets.prepare import verify


@pytest.fixture
def root(tmp_path):
    """Four images, each of another width; verified once."""
    for i, name in enumerate(("cat/é.jpg", "cat/b.png", "dog/c.jpg", "d.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (10 + i, 8)).save(tmp_path / name)
    assert read_measured(tmp_path) is None
    assert verify(tmp_path) == []
    return tmp_path


def test_sizes_are_those_of_their_images(root):
    measured = read_measured(root)
    assert measured.paths == find_images(root, "train").paths == ["cat/b.png", "cat/é.jpg", "d.jpg", "dog/c.jpg"]
    assert measured.sizes[:, 1:].tolist() == [[11, 8], [10, 8], [13, 8], [12, 8]]
    assert measured.sizes[:, 0].tolist() == [(root / path).stat().st_size for path in measured.paths]


def test_every_change_is_named(root):
    Image.new("RGB", (99, 8)).save(root / "d.jpg")
    (root / "cat" / "b.png").rename(root / "cat" / "new.png")
    (root / "dog" / "c.jpg").write_bytes(b"")
    reasons = [line.partition(f"{root}/")[2].partition(":")[0] for line in verify(root)]
    assert sorted(reasons) == ["cat/b.png is missing", "cat/new.png is new", "d.jpg has changed", "dog/c.jpg"]
    assert "cat/new.png" not in read_measured(root).paths  # a damaged set is not remembered as it is


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off", None])
def test_a_damaged_file_is_none_and_made_anew(root, content):
    file = root / NAME
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    assert read_measured(root) is None
    assert verify(root) == []
    assert read_measured(root) is not None


def test_objects_are_not_unpickled(root):
    np.savez(root / NAME, paths=np.array([object()]), sizes=np.zeros((1, 3)))
    assert read_measured(root) is None
