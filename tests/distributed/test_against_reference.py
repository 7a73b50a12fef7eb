"""The program on 1, 2 and 4 ranks, with and without gradient accumulation, against plain float64 on one process."""

import pytest

from tests.distributed.expected import MANY_STEPS, STEPS, VERSIONS, differences, reference
from tests.distributed.program import run_program, small_config
from tests.reference import rate_of_epoch
from tests.world import run


@pytest.mark.parametrize(("world_size", "accum", "block"), [(2, 1, None), (2, 2, None), (2, 2, 16), (4, 1, 32)])
def test_equals_the_reference(world_size, accum, block):
    """With a block on one rank, on two, and the whole batch as one."""
    config = small_config(optim={"grad_accum_steps": accum}, shuffle={"block_size": block})
    found = differences(run(run_program, world_size, config, STEPS), reference(block=block))
    assert max(found.values()) < 1e-10, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "world_size", "accum"),
    [("v1", 1, 1), ("v1", 2, 2), ("v1", 4, 1), ("v2", 1, 1), ("v2", 2, 1), ("v2", 8, 1), ("v2", 1, 4)],
)
def test_v1_and_v2_equal_the_reference_over_a_whole_schedule(version, world_size, accum):
    settings = VERSIONS[version]
    config = small_config(**{**settings, "optim": {**settings["optim"], "grad_accum_steps": accum}})
    expected = reference(MANY_STEPS, version=version)
    found = differences(run(run_program, world_size, config, MANY_STEPS), expected)
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize(("world_size", "accum", "queue_size"), [(1, 2, 101), (2, 1, 101), (2, 2, 64)])
def test_a_queue_that_starts_with_keys(world_size, accum, queue_size):
    """One batch fills it, or the two of the epoch, the second over the end."""
    config = small_config(moco={"queue_size": queue_size, "queue_start": "keys"}, optim={"grad_accum_steps": accum})
    filling = (0, 1) if queue_size > 64 else (1,)
    found = differences(run(run_program, world_size, config, 3), reference(3, queue_size, filling=filling))
    assert max(found.values()) < 1e-10, found
    assert reference(1, queue_size, filling=filling)["losses"][0] > reference(1, queue_size)["losses"][0] + 0.1


def test_v1_and_v2_differ():
    """Each schedule moves within the 10 steps, and the two heads and temperatures give other losses."""
    rates = {
        "v1": [rate_of_epoch(epoch, lr=1.0, epochs=5, milestones=(3, 4)) for epoch in range(5)],
        "v2": [rate_of_epoch(epoch, lr=1.0, epochs=5) for epoch in range(5)],
    }
    assert rates["v1"] == pytest.approx([1.0] * 3 + [0.1, 0.01])
    assert (rates["v2"][0], rates["v2"][1]) == pytest.approx((1.0, 0.9045), abs=1e-4)
    assert reference(1, version="v1")["losses"][0] != pytest.approx(reference(1, version="v2")["losses"][0], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("queue_size", [64, 101])
def test_a_queue_of_one_batch_and_one_that_ranks_do_not_divide(queue_size):
    config = small_config(moco={"queue_size": queue_size})
    found = differences(run(run_program, 4, config, 3), reference(3, queue_size))
    assert max(found.values()) < 1e-10, found


def test_the_reference_learns_and_data_differ():
    """The comparison means something: the loss moves, the queue is overwritten, gradients are not tiny."""
    outcome = reference()
    assert abs(outcome["losses"][-1] - outcome["losses"][0]) > 0.05
    assert max(g.abs().max() for g in outcome["gradients"][-1].values()) > 1e-3
    assert outcome["queue_ptr"] == STEPS * 64 % 152
