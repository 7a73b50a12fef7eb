"""RUN is removed or replaced while a run goes on; RUN is another folder on another host."""

import os
import shutil
import signal
import threading
import time

import pytest

from moco_dist.distributed.collectives import barrier
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_IN_USE, UserError
from moco_dist.method.build import build_method
from moco_dist.run import checkpoint, lock
from moco_dist.run.lock import locked, require_shared
from tests.distributed.program import saver_for, small_config
from tests.world import run


@pytest.fixture
def stops(monkeypatch):
    """An event that is set when this process is told to stop."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.02)
    yield told
    signal.signal(signal.SIGTERM, before)


def is_refused(run_dir):
    """Whether another process cannot have the folder."""
    pid = os.fork()
    if not pid:
        try:
            with locked(run_dir, World()):
                os._exit(0)
        except UserError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_folder_that_was_removed_is_made_and_locked_again_and_the_run_is_told_to_stop(tmp_path, stops, capsys):
    run_dir = tmp_path / "run"
    with locked(run_dir, World()):
        shutil.rmtree(run_dir)
        assert stops.wait(20)
        assert is_refused(run_dir)
    assert not is_refused(run_dir)
    assert f"run.dir {run_dir} was removed; it is made again, and the run saves there" in capsys.readouterr().err


def test_a_lock_that_was_removed_is_taken_again(tmp_path, stops, capsys):
    with locked(tmp_path, World()):
        (tmp_path / "config.yaml").touch()
        (tmp_path / ".lock").unlink()
        until = time.monotonic() + 20
        while not (is_back := (tmp_path / ".lock").exists() and is_refused(tmp_path)) and time.monotonic() < until:
            time.sleep(0.02)
        assert is_back
        assert not stops.is_set()


def test_a_run_ends_where_another_has_taken_its_place(tmp_path, stops):
    """The other one's folder is moved to where the first one was."""
    reader, writer = os.pipe()
    first = os.fork()
    if not first:
        with locked(tmp_path / "run", World()):
            os.write(writer, b"!")
            time.sleep(20)
        os._exit(0)
    os.read(reader, 1)
    with locked(tmp_path / "other", World()):
        (tmp_path / "other" / ".lock").replace(tmp_path / "run" / ".lock")
        assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == EXIT_IN_USE


def look(world, folders):
    lock.SEEN_SECONDS = 0.2
    folders[world.rank].mkdir(exist_ok=True)
    try:
        require_shared(folders[world.rank], world)
    except UserError as error:
        return str(error)
    barrier(world)
    return [path for path in folders[world.rank].rglob("*") if path.is_file()]


def test_all_ranks_refuse_a_folder_that_one_does_not_see(tmp_path):
    shared = tmp_path / "shared"
    assert run(look, 3, [shared] * 3) == [[]] * 3  # and nothing is left of it
    for text in run(look, 3, [shared, shared, tmp_path / "own"]):
        assert "is not one folder for all ranks: rank 2 on host" in text
        assert "it has to lie on a disk that all hosts share" in text


def save_apart(world, run_dir):
    """Each rank into a folder of its own, as on the disks of two hosts."""
    said, own = [], run_dir / str(world.rank)
    method = build_method(small_config(), world)
    saver = saver_for(own, world, said.append, keep_last=2, keep_every_steps=0)
    saver.save(method, [])
    with pytest.raises(UserError, match="last checkpoint was not written: .* of another rank is not here"):
        saver.finish()
    return said, checkpoint.complete_checkpoints(own)


def test_a_checkpoint_of_which_a_part_is_elsewhere_is_never_complete(tmp_path):
    for said, complete in run(save_apart, 2, tmp_path):
        assert len(said) == 1
        assert "no checkpoint at step 0: " in said[0]
        assert complete == []
