"""Storage that stumbles is waited for, within a limit, and told."""

import errno
import time
from pathlib import Path

import pytest

from moco_dist.data import storage
from moco_dist.data.folder import read_bytes
from moco_dist.data.images import ImageError

pytestmark = pytest.mark.usefixtures("waits")


def failing(monkeypatch, number, times):
    """Let the next `times` reads fail with errno `number`."""
    original, left = Path.read_bytes, [times]

    def read(path):
        if left[0]:
            left[0] -= 1
            raise OSError(number, "Stale file handle")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read)


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


def test_a_slow_file_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert read_bytes(tmp_path / "a.jpg") == b"pixels"
    assert capsys.readouterr().err == f"[rank 0] warning: reading {tmp_path / 'a.jpg'} took 15 s\n"
