"""The user's mistake (2), or a disk's, a file server's or a network's failure (74, 69), which may pass."""

import errno
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.api import CheckpointException

from moco_dist.cli.main import main
from moco_dist.config.source import read_yaml
from moco_dist.data import storage
from moco_dist.data.folder import read_bytes
from moco_dist.data.images import ImageError, cannot_read
from moco_dist.data.tasks import MAX_SUCCESSORS, with_successors
from moco_dist.datasets import imagenet
from moco_dist.datasets.published import _downloading, _read_idx
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_IO, EXIT_MISTAKE, EXIT_UNREACHABLE, UserError, file_error
from moco_dist.launchers import kubernetes, slurm
from moco_dist.run import tensors, weights

OF_PATHS = [errno.ENOENT, errno.EACCES, errno.EROFS, errno.EISDIR]
OF_STORAGE = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN]
EVERY = [(number, EXIT_MISTAKE) for number in OF_PATHS] + [(number, EXIT_IO) for number in OF_STORAGE]


def failing(number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    return fails


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (80, 70), (i, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")
    return tmp_path / "images"


@pytest.fixture
def unreadable(monkeypatch, waits):
    """A function that lets 1.jpg fail from now on."""
    original = storage.read_file

    def harm(number):
        fails = failing(number)
        monkeypatch.setattr(storage, "read_file", lambda path: (fails if path.name == "1.jpg" else original)(path))

    return harm


@pytest.mark.parametrize(("number", "status"), EVERY)
def test_a_file_that_somebody_named(number, status, monkeypatch, tmp_path):
    error = OSError(number, os.strerror(number))
    assert file_error("x", error).exit_status == status
    monkeypatch.setattr(Path, "open", failing(number))
    monkeypatch.setattr(Path, "read_bytes", failing(number))
    monkeypatch.setattr(weights, "write_whole", failing(number))
    monkeypatch.setattr(torch, "load", failing(number))
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    uses = [
        lambda: read_yaml(tmp_path / "a.yaml"), lambda: _read_idx(tmp_path / "a.gz", 3),
        lambda: weights.save({}, tmp_path / "a.pth", {}), lambda: weights._read(tmp_path / "a.pth"),
        lambda: imagenet._read_kaggle(tmp_path),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(UserError) as caught:
            use()
        assert caught.value.exit_status == status, str(caught.value)
    assert imagenet._cannot_unpack(tmp_path, error).exit_status == status


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.EIO, EXIT_IO), (errno.ESTALE, EXIT_IO), (errno.EACCES, EXIT_IO), (errno.ENOENT, EXIT_IO),
     (errno.ETIMEDOUT, EXIT_IO), (errno.EISDIR, EXIT_MISTAKE), (errno.ELOOP, EXIT_MISTAKE)],
)  # fmt: skip
def test_one_image_of_a_list(images, unreadable, number, status):
    """It was there when it was listed; a folder or a circle of links under its name was none then either."""
    unreadable(number)
    with pytest.raises(ImageError, match=rf"cannot read image .*/1\.jpg: {os.strerror(number).lower()}") as caught:
        read_bytes(images / "1.jpg")
    assert pickle.loads(pickle.dumps(caught.value)).exit_status == status  # a loader's worker sends it


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, EXIT_IO), (errno.EISDIR, EXIT_MISTAKE)])
def test_a_hundred_images_in_a_row(images, number, status):
    def attempt(candidate):
        raise cannot_read("x.jpg", OSError(number, "it failed"))

    replaced = []
    with pytest.raises(ImageError, match=f"{MAX_SUCCESSORS} images in a row") as caught:
        with_successors(0, 500, images, "skip-and-report", attempt, replaced)
    assert caught.value.exit_status == status
    assert len(replaced) == MAX_SUCCESSORS


def test_a_damaged_image_is_left_out_of_a_packed_file(images, capsys):
    (images / "0.jpg").write_bytes(b"no image")
    assert main(["data", "pack", str(images), str(images.with_suffix(".beton"))]) == 0
    assert "1 unreadable, see" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["pack", "prepare"])
@pytest.mark.parametrize(("number", "status"), [(errno.EIO, EXIT_IO), (errno.ESTALE, EXIT_IO), (errno.EACCES, 0)])
def test_images_are_left_out_by_their_own_fault_alone(images, tmp_path, unreadable, capsys, command, number, status):
    """A file server that fails half way would else take half of the images out of a data set."""
    unreadable(number)
    out = tmp_path / "out.beton"
    words = ["pack", str(images), str(out)] if command == "pack" else [
        "prepare", "imagefolder", "--source", str(images), "--out", str(out)]  # fmt: skip
    assert main(["data", *words]) == status
    text = "".join(capsys.readouterr())
    if status:
        assert f"error: cannot read image {images}/1.jpg: {os.strerror(number).lower()}\n" in text
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
    else:
        assert "1 unreadable, see" in text


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, EXIT_IO), (errno.ECONNRESET, EXIT_UNREACHABLE)])
def test_a_download(tmp_path, monkeypatch, number, status, capsys):
    """The disk that it is written to, or the server."""

    def download(*_, **__):
        with _downloading("https://host/x"):
            failing(number)()

    monkeypatch.setattr("moco_dist.datasets.published.CIFAR10", type("", (), {"url": "", "__init__": download}))
    assert main(["data", "prepare", "cifar10", "--out", str(tmp_path / "out")]) == status
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "status"),
    [("slurm_load_partitions: Unable to contact slurm controller (connect failure)", EXIT_UNREACHABLE),
     ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", EXIT_UNREACHABLE),
     ("sbatch: error: invalid account or account/partition combination specified", EXIT_MISTAKE)],
)  # fmt: skip
def test_slurm_refuses_or_does_not_answer(tmp_path, monkeypatch, said, status):
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\necho '{said}' >&2; exit 1\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match="sinfo: s") as caught:
        slurm._run(["sinfo"])
    assert caught.value.exit_status == status


@pytest.mark.parametrize(
    ("said", "is_down"),
    [("The connection to the server 127.0.0.1:1 was refused - did you specify the right host or port?", True),
     ("Unable to connect to the server: net/http: TLS handshake timeout", True),
     ("Error from server (Forbidden): jobs.batch is forbidden: User cannot create", False)],
)  # fmt: skip
def test_kubectl_refuses_or_does_not_answer(said, is_down):
    assert bool(kubernetes.NO_SERVER.search(said)) == is_down


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, EXIT_IO), (None, EXIT_MISTAKE)])
def test_a_checkpoint(tmp_path, monkeypatch, number, status):
    """Its disk fails, or it is another model's."""
    error = OSError(number, os.strerror(number)) if number else ValueError("size mismatch")

    def read_metadata(_):
        raise CheckpointException("load", {0: (error, None)})

    monkeypatch.setattr(tensors.dcp.HuggingFaceStorageReader, "read_metadata", read_metadata)
    with pytest.raises(UserError) as caught:
        tensors.Stored(tmp_path, World())
    assert caught.value.exit_status == status


def test_a_table_ends_as_the_command_that_failed(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 74)
    monkeypatch.setattr("moco_dist.reproduce.tables.subprocess.run", lambda words: done)
    words = ["reproduce", "table2", "--scale", "small", "--out", str(tmp_path / "out")]
    assert main(words) == 74
    done.returncode = -9
    assert main(words) == 137
