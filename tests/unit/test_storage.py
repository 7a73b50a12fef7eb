"""Storage that stumbles is waited for, within a limit, and told."""

import errno
import os
import socket
import time
from pathlib import Path

import pytest

from moco_dist.data import storage
from moco_dist.data.folder import read_bytes
from moco_dist.data.images import ImageError

pytestmark = pytest.mark.usefixtures("waits")


def failing(monkeypatch, number, times):
    """Let the next `times` reads fail with errno `number`."""
    original, left = storage.read_file, [times]

    def read(path):
        if left[0]:
            left[0] -= 1
            raise OSError(number, "Stale file handle")
        return original(path)

    monkeypatch.setattr(storage, "read_file", read)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_hiccup_is_waited_out_and_told(tmp_path, monkeypatch, waits, capsys, number):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    failing(monkeypatch, number, 3)
    assert read_bytes(tmp_path / "a.jpg") == b"pixels"
    assert waits == list(storage.WAITS_SECONDS)
    (line,) = capsys.readouterr().err.splitlines()  # one a minute
    assert line == f"[rank 0] warning: reading {tmp_path / 'a.jpg'} failed (stale file handle); tried again in 0.5 s"


def test_the_fourth_failure_is_the_last(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    failing(monkeypatch, errno.EIO, 4)
    with pytest.raises(ImageError, match=r"cannot read image .*a\.jpg: stale file handle"):
        read_bytes(tmp_path / "a.jpg")


def test_a_missing_file_is_not_waited_for(tmp_path, waits):
    with pytest.raises(ImageError, match="no such file"):
        read_bytes(tmp_path / "a.jpg")
    assert waits == []


def test_a_file_is_read_whole_however_little_comes_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 4)))
    assert read_bytes(tmp_path / "a.jpg") == b"pixels"


def test_a_file_whose_size_is_not_told_is_read_whole():
    assert read_bytes(Path("/proc/self/stat")).startswith(str(os.getpid()).encode())


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path, monkeypatch, waits, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path may be short only
    with socket.socket(socket.AF_UNIX) as server:
        {"pipe": lambda: os.mkfifo("a.jpg"), "socket": lambda: server.bind("a.jpg"),
         "device": lambda: os.symlink("/dev/zero", "a.jpg")}[kind]()  # fmt: skip
        with pytest.raises(ImageError, match=r"a\.jpg: a pipe, socket or device, and no file"):
            read_bytes(tmp_path / "a.jpg")
    assert waits == []


def test_a_slow_file_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert read_bytes(tmp_path / "a.jpg") == b"pixels"
    assert capsys.readouterr().err == f"[rank 0] warning: reading {tmp_path / 'a.jpg'} took 15 s\n"
