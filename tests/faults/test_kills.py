"""Twenty runs, each killed at a random event of a random rank, then resumed: not a bit may differ."""

import json
import os
import random

import pytest

from moco_dist.run import checkpoint
from tests.distributed.program import largest_difference
from tests.faults.injector import train
from tests.world import run

WORLD_SIZE = 2
KILLS = int(os.environ.get("MOCO_DIST_KILLS", "20"))  # make soak: 200


def losses(run_dir):
    """Step to loss, rank by rank; a step that was repeated must have given the same loss."""
    curves = []
    for rank in range(WORLD_SIZE):
        curve = {}
        for line in (run_dir / f"losses_{rank}.jsonl").read_text().splitlines():
            step, loss = json.loads(line)
            assert curve.setdefault(step, loss) == loss
        curves.append(curve)
    return curves


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never stopped."""
    run_dir = tmp_path_factory.mktemp("whole")
    results = run(train, WORLD_SIZE, run_dir)
    return [count for count, _, _ in results], [tensors for _, _, tensors in results], losses(run_dir)


@pytest.mark.slow
@pytest.mark.timeout(90 * KILLS)
def test_killed_anywhere_it_ends_as_if_it_had_not_been(tmp_path, whole):
    counts, expected, curve = whole
    rng = random.Random(0)
    for kill in range(KILLS):
        run_dir = tmp_path / f"kill{kill}"
        run_dir.mkdir()
        rank = rng.randrange(WORLD_SIZE)
        event = rng.randrange(1, counts[rank] + 1)
        with pytest.raises(RuntimeError):
            run(train, WORLD_SIZE, run_dir, rank, event)
        survived = checkpoint.complete_checkpoints(run_dir)
        resumed = run(train, WORLD_SIZE, run_dir)
        what = f"killed rank {rank} at event {event} of {counts[rank]}"
        for r, (_, start, tensors) in enumerate(resumed):
            assert start == (int(survived[-1].name[-8:]) if survived else 0), what
            assert largest_difference(tensors, expected[r]) == 0.0, what
        assert losses(run_dir) == curve, what
