"""The real command, killed where it happens to be: its log and its weights are those of a run that never was."""

import json
import random
import time

import pytest
import safetensors.torch
import torch

from moco_dist.run import checkpoint
from tests.faults.processes import rank_processes, wait_for_step

STOP = 88
OF_THE_CLOCK = {"images_per_second", "data_wait_share", "eta_seconds", "memory_bytes"}


def curve(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_THE_CLOCK} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_killed_twice_it_ends_as_if_it_had_not_been(start, tmp_path):
    """Log and checkpoint intervals do not divide one another: losses of an interval under way are carried over."""
    run_dir, whole_dir = tmp_path / "run", tmp_path / "whole"
    flags = ["--log.every-steps", "3", "--checkpoint.every-steps", "4", "--run.stop-at-step", str(STOP)]
    process, rng = start(run_dir, *flags, torchrun=("--max-restarts", "2")), random.Random()
    for rank, first in ((1, 6), (0, 36)):
        wait_for_step(process, run_dir, first + rng.randrange(12))
        time.sleep(rng.random() / 10)
        rank_processes(process)[rank].kill()
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.count("goes on at step") == 2, output

    whole = start(whole_dir, *flags)
    whole.communicate()
    assert curve(run_dir) == curve(whole_dir)
    assert [row["step"] for row in curve(run_dir)] == [*range(3, STOP, 3), STOP]
    ours, theirs = tensors(run_dir), tensors(whole_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def tensors(run_dir):
    """Everything in the newest checkpoint and the backbone; ranks' parts of the queue as they are in the files."""
    files = [*sorted(checkpoint.latest(run_dir).glob("*.safetensors")), run_dir / "backbone.safetensors"]
    return {f"{file.name} {name}": value for file in files for name, value in safetensors.torch.load_file(file).items()}
