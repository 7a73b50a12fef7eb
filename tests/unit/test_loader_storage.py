"""`data.on_error` and patience with storage are the same whichever loader reads."""

import errno
import os
from pathlib import Path

import pytest

from moco_dist.data import dali as dali_loader
from moco_dist.data import storage
from moco_dist.data.beton import read_beton
from moco_dist.data.images import ImageError
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World
from tests.unit.loaders import assert_same, batches_of, config_of, undamaged

BAD = "3.jpg"


@pytest.fixture
def images(tmp_path, loader):
    """Eight images: a folder of them, and what the loader reads."""
    folder = tmp_path / "images"
    undamaged(folder)
    return folder, pack(folder, tmp_path / "packed.beton") if loader == "ffcv" else folder


def stumble(monkeypatch, root, times):
    """Let the next `times` reads of one image fail, whoever reads it."""
    left = [times]

    def fails(hit):
        if hit and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")

    original, ends, preadv = storage.read_file, dali_loader._ends, os.preadv

    def read_bytes(path):
        fails(Path(path).name == BAD)
        return original(path)

    def first_and_last_bytes(path):
        if path.name == BAD and left[0]:
            raise OSError(errno.EIO, "Input/output error")
        return ends(path)

    place = None
    if root.is_file():
        beton = read_beton(root)
        place = int(beton.start[beton.names.index(f"train/{BAD}")])

    def read_at(fd, buffers, offset):
        fails(offset == place)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(storage, "read_file", read_bytes)
    monkeypatch.setattr(dali_loader, "_ends", first_and_last_bytes)
    monkeypatch.setattr(os, "preadv", read_at)


def tolerance(loader):
    return (0.3, 16) if loader == "dali" else (0, 0)


def test_a_hiccup_is_waited_out_and_told(images, loader, waits, monkeypatch, capsys):
    folder, root = images
    reference = batches_of(config_of(folder, "torchvision"), 0, 1)
    stumble(monkeypatch, root, 3)
    ours = batches_of(config_of(root, loader), 0, 1)
    assert_same(ours, reference, *tolerance(loader))
    assert waits == list(storage.WAITS_SECONDS)
    assert f"{BAD} failed (input/output error); tried again in 0.5 s" in capsys.readouterr().err


def test_an_image_that_stays_unreadable_is_for_on_error(images, loader, waits, monkeypatch):
    folder, root = images
    stumble(monkeypatch, root, 10**6)
    with pytest.raises(ImageError, match=rf"cannot read image .*{BAD}: input/output error"):
        batches_of(config_of(root, loader), 0, 1)
    (batch,) = batches_of(config_of(root, loader, on_error="skip-and-report"), 0, 1)
    (line,) = batch.replaced
    assert f"{BAD}: input/output error" in line
    monkeypatch.undo()
    (folder / BAD).write_bytes((folder / "4.jpg").read_bytes())
    assert_same([batch], batches_of(config_of(folder, "torchvision"), 0, 1), *tolerance(loader))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_for_on_error(images, loader, num_workers):
    folder, root = images
    if root.is_file():
        beton = read_beton(root)
        with root.open("r+b") as file:
            file.seek(int(beton.start[beton.names.index(f"train/{BAD}")]))
            file.write(b"\0" * 200)
    else:
        (root / BAD).write_bytes(b"\0" * 200)
    with pytest.raises(ImageError, match=rf"cannot read image .*{BAD}: not an image"):
        batches_of(config_of(root, loader, num_workers=num_workers), 0, 1)
    (batch,) = batches_of(config_of(root, loader, num_workers=num_workers, on_error="skip-and-report"), 0, 1)
    assert len(batch.replaced) == 1
    (folder / BAD).write_bytes((folder / "4.jpg").read_bytes())
    assert_same([batch], batches_of(config_of(folder, "torchvision"), 0, 1), *tolerance(loader))


def test_a_packed_file_that_was_cut_off_kills_no_worker(tmp_path, waits):
    """Mapped memory would: reading it beyond the file's end is a bus error."""
    undamaged(tmp_path / "images")
    root = pack(tmp_path / "images", tmp_path / "packed.beton")
    folder = find_images(root, "train")
    plan = Plan(len(folder.paths), 8, 0)
    batches = pretrain_batches(folder, config_of(root, "ffcv", num_workers=1), plan, World(), 0, 1)
    with root.open("r+b") as file:
        file.truncate(2**20)
    with pytest.raises(ImageError, match="cannot read image"):
        list(batches)
