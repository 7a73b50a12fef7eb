"""Files that two write, or none can; RUN/.lock and the locks of journals, and file systems that have none."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.files import LineFile, write_whole
from moco_dist.run import lock, weights
from moco_dist.run.lock import locked


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """As two evaluations of a run, which share their features."""
    path, write = tmp_path / "folder" / "result.json", Path.write_bytes

    def write_and_let_another_in(self, content):
        write(self, content)
        monkeypatch.setattr(Path, "write_bytes", write)
        write_whole(path, b"another's")

    monkeypatch.setattr(Path, "write_bytes", write_and_let_another_in)
    write_whole(path, b"own")
    assert path.read_bytes() == b"own"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_weights_on_a_full_disk(tmp_path, monkeypatch, name):
    """Safetensors and torch have errors of their own for it, which no command would make a line of."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=f"{name} cannot be written: no space left on device"):
        weights.save({"weight": torch.zeros(3)}, tmp_path / name, {})


def test_a_second_process_is_refused_and_told_by_whom(tmp_path):
    with locked(tmp_path, World()):
        pid = os.fork()
        if not pid:
            try:
                with locked(tmp_path, World()):
                    os._exit(1)
            except UserError as error:
                os._exit(0 if f"in use by process {os.getppid()} on host" in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_workers_that_outlive_a_killed_rank_do_not_hold_it(tmp_path):
    """They look for their parent every few seconds, and one that waits for storage does not even do that."""
    reader, writer = os.pipe()
    rank = os.fork()
    if not rank:
        with locked(tmp_path, World()):
            worker = os.fork()
            if not worker:
                time.sleep(60)
                os._exit(0)
            os.write(writer, f"{worker}\n".encode())
            time.sleep(60)
    worker = int(os.read(reader, 20))
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    try:
        with locked(tmp_path, World()):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    """As Lustre mounted without `flock`, or NFS without its lock service."""

    def not_here(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", not_here)
    monkeypatch.setattr(fcntl, "lockf", not_here)
    with locked(tmp_path, World()):
        pass
    assert f"{tmp_path} is on a file system without locks (function not implemented)" in capsys.readouterr().err
    assert LineFile(tmp_path / "journal.jsonl").is_locked


@pytest.mark.parametrize("is_freed", [False, True])
def test_a_host_that_may_be_gone_is_waited_for(tmp_path, monkeypatch, capsys, is_freed):
    """Its file server frees its locks when the lease is over, and the run was queued again before that."""
    reader, writer = os.pipe()
    holder = os.fork()
    if not holder:
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with locked(tmp_path, World()):
            os.write(writer, b"!")
            time.sleep(60)
    os.read(reader, 1)

    def wait(_):
        if is_freed:
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)

    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr(lock, "LOST_HOST_SECONDS", 0.5)
    try:
        with contextlib.ExitStack() as stack:
            if is_freed:
                stack.enter_context(locked(tmp_path, World()))
            else:
                with pytest.raises(UserError, match=f"in use by process {holder} on host elsewhere"):
                    stack.enter_context(locked(tmp_path, World()))
    finally:
        if not is_freed:
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
    assert f"in use by process {holder} on host elsewhere; waiting up to 0.5 s" in capsys.readouterr().err


@pytest.mark.parametrize("is_held", [False, True])
def test_a_half_line_is_cut_off_by_who_may(tmp_path, is_held):
    """What another process is about to write is left alone, until this one writes too."""
    path = tmp_path / "journal.jsonl"
    other = LineFile(path)
    other.append("first")
    if not is_held:
        other.close()
    with path.open("a") as file:
        file.write("sec")
    lines = LineFile(path)
    assert lines.is_locked is not is_held
    assert path.read_text() == ("first\nsec" if is_held else "first\n")
    lines.append("third")
    assert path.read_text() == "first\nthird\n"
