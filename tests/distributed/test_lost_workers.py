"""A rank whose loader workers are killed again and again: all ranks save, and end with 69."""

import multiprocessing
import os
import signal

import pytest

from moco_dist import train
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.data.workers import Batches
from moco_dist.errors import EXIT_UNREACHABLE, LoadingError
from moco_dist.run import checkpoint
from moco_dist.run.folder import RunFolder
from moco_dist.tracking import Tracker
from tests.faults.processes import TINY, losses
from tests.world import run

FAILS_AT = 6  # a batch, from 0


def train_with_a_fault(world, words, has_fault):
    original = Batches.__getitem__

    def make(self, number):
        if world.rank == 1 and number >= FAILS_AT and multiprocessing.current_process().name == "loader":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, number)

    if has_fault:
        Batches.__getitem__ = make  # in this process, which is not used again
    config = read_config(PretrainConfig, None, words)
    config.run.dir.mkdir(exist_ok=True)
    try:
        train.pretrain(config, world, Tracker())
    except LoadingError as error:
        return str(error), error.exit_status
    return "", 0


@pytest.mark.slow
def test_all_ranks_save_and_end(tiny_data, tmp_path):
    words = [*TINY, "--data.root", str(tiny_data), "--shuffle.exchange", "all_to_all", "--log.every-steps", "1",
             "--run.stop-at-step", "18", "--data.num-workers", "2"]  # fmt: skip
    faulty, whole = tmp_path / "faulty", tmp_path / "whole"
    other, own = run(train_with_a_fault, 2, [*words, "--run.dir", str(faulty)], True)
    (saved,) = checkpoint.complete_checkpoints(faulty)
    step = int(saved.name.removeprefix("step_"))
    assert FAILS_AT < step < 18
    assert other == (f"another rank cannot load; saved at step {step}", EXIT_UNREACHABLE)
    assert own[1] == EXIT_UNREACHABLE
    assert "was killed (SIGKILL" in own[0] and "the 3rd at this batch" in own[0]
    assert not RunFolder(faulty).stopped.exists()
    assert run(train_with_a_fault, 2, [*words, "--run.dir", str(faulty)], False) == [("", 0)] * 2
    assert run(train_with_a_fault, 2, [*words, "--run.dir", str(whole)], False) == [("", 0)] * 2
    assert losses(faulty) == losses(whole)
