"""The index of a large folder is believed only as long as it is right."""

import os
import pickle
import time

import numpy as np
import pytest

from moco_dist.data import index
from moco_dist.data.images import hash_of_contents, subset
from moco_dist.data.index import NAME, indexed_images
from moco_dist.data.layout import IMAGE_SUFFIXES, folder_names
from moco_dist.data.mapped import MappedArray, file_of, map_arrays
from moco_dist.data.sources import find_images
from moco_dist.distributed.told import Told
from moco_dist.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twelve files in three folders, one of them two deep, last changed a minute ago; any number is large."""
    monkeypatch.setattr(index, "MIN_IMAGES", 1)
    for name in ("a", "b/deep", "c"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / name / f"{i}.jpg").touch()
    settle(tmp_path)
    return tmp_path


def settle(folder):
    for path in folder.rglob("*"):
        if path.is_dir():
            os.utime(path, (time.time() - 60, time.time() - 60 + len(path.name)))


def image_paths(folder):
    """As `find_images` asks for them."""
    return list(indexed_images(folder, folder_names(folder)).paths)


def recrafted(folder, **changes):
    """The index with other arrays."""
    facts, arrays = map_arrays(folder / NAME)
    (folder / NAME).write_bytes(b"".join(file_of(facts, {**arrays, **changes})))


def test_is_written_and_used(folder, monkeypatch):
    paths = image_paths(folder)
    assert len(paths) == 12 and (folder / NAME).is_file()
    monkeypatch.setattr(index, "_scan", None)  # not called again
    assert image_paths(folder) == paths
    found = find_images(folder, "train")
    assert found.paths == paths and found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.content_hash == hash_of_contents(paths, found.labels) and found.known_content_hash


def test_its_arrays_are_mapped_and_not_of_this_process(folder):
    image_paths(folder)
    found = find_images(folder, "train")
    assert isinstance(found.labels, MappedArray) and not found.labels.flags.writeable
    other = pickle.loads(pickle.dumps(found))  # what another rank of the host is told
    assert isinstance(other.labels, MappedArray) and other.paths == found.paths
    assert len(pickle.dumps(found)) < 2000


def test_a_long_listing_says_how_far_it_is(folder, monkeypatch):
    lines = []

    class Heard(Told):
        def __exit__(self, *error):
            lines.append(self.line())
            super().__exit__(*error)

    monkeypatch.setattr(index, "Told", Heard)
    image_paths(folder)
    assert lines == [f"listing {folder}: 12 images  begun 0:00:00 ago"]


def test_other_classes_have_other_labels(folder):
    """Those of a validation set are training's."""
    assert indexed_images(folder, ["a", "b", "c"]).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert indexed_images(folder, ["a", "ab", "b", "c"]).labels.tolist() == [0] * 4 + [2] * 4 + [3] * 4


def test_a_part_of_the_images_has_a_hash_of_its_own(folder):
    image_paths(folder)
    found = find_images(folder, "train")
    part = subset(found, 6)
    assert part.content_hash == hash_of_contents(part.paths, part.labels) != found.content_hash


CHANGES = {
    "its labels are of no class": lambda f: recrafted(f, labels=np.array([0, 9] * 6)),
    "its labels are no integers": lambda f: recrafted(f, labels=np.zeros(12)),
    "its names end before they begin": lambda f: recrafted(f, ends=np.arange(12)[::-1].copy()),
    "its names end beyond their end": lambda f: recrafted(f, ends=np.arange(12) * 1000),
    "a file came": lambda f: (f / "a" / "new.jpg").touch(),
    "a file went": lambda f: (f / "b" / "deep" / "0.jpg").unlink(),
    "a folder came": lambda f: ((f / "d").mkdir(), (f / "d" / "0.jpg").touch()),
    "a folder deep below came": lambda f: ((f / "c" / "e").mkdir(), (f / "c" / "e" / "0.jpg").touch()),
    "a folder went": lambda f: ([p.unlink() for p in (f / "c").iterdir()], (f / "c").rmdir()),
    "a folder was renamed": lambda f: (f / "c").rename(f / "z"),
    "a file came beside the folders": lambda f: (f / "0.jpg").touch(),
    "the index is damaged": lambda f: (f / NAME).write_text('{"top": ['),
    "the index is cut off": lambda f: (f / NAME).write_bytes((f / NAME).read_bytes()[:-8]),
    "the index is something else": lambda f: (f / NAME).write_text("[1, 2]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_is_not_believed_when(folder, change):
    image_paths(folder)
    CHANGES[change](folder)
    expected = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    assert image_paths(folder) == expected
    settle(folder)
    assert image_paths(folder) == expected  # and a new index is written, and right
    assert image_paths(folder) == expected


def test_is_not_written_while_folders_change_or_for_few_images(folder, monkeypatch):
    (folder / "a" / "new.jpg").touch()
    image_paths(folder)
    assert not (folder / NAME).exists()
    settle(folder)
    monkeypatch.setattr(index, "MIN_IMAGES", 100)
    image_paths(folder)
    assert not (folder / NAME).exists()


def test_a_link_to_a_folder_above_it_is_named(folder):
    (folder / "b" / "again").symlink_to(folder)
    with pytest.raises(UserError, match=r"b/again is a link to .*, which it lies in; remove it"):
        image_paths(folder)


def test_a_link_to_another_folder_is_followed(folder):
    (folder / "d").symlink_to(folder / "b" / "deep")
    assert len(image_paths(folder)) == 16


def test_the_images_are_those_of_torchvision():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert IMAGE_SUFFIXES == IMG_EXTENSIONS
