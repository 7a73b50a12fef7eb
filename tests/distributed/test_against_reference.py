"""The program on 1, 2 and 4 ranks, with and without gradient accumulation, against plain float64 on one process."""

import functools

import pytest
import torch

from moco_dist.data.plan import Plan
from moco_dist.optim import peak_learning_rate
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, run_program, small_config
from tests.reference import Reference
from tests.world import run

STEPS = 6  # 6 x 64 keys go around the queue of 152 more than twice
MANY_STEPS = 20


@functools.cache
def reference(steps=STEPS, queue_size=152):
    config = small_config(moco={"queue_size": queue_size})
    start = run(run_program, 1, config, 0)[0]["initial"]
    plain = Reference(
        start["weights"], start["queue"], hidden=24, dim=16, group=config.model.bn_group_size,
        momentum=config.moco.momentum, temperature=config.moco.temperature, lr=peak_learning_rate(config.optim),
        sgd_momentum=config.optim.sgd_momentum, weight_decay=config.optim.weight_decay,
    )
    plan, table = Plan(NUM_SAMPLES, config.optim.global_batch_size, config.run.seed), images()
    losses, gradients = [], []
    for step in range(steps):
        batch = table[torch.from_numpy(plan.global_indices(step))]
        loss, gradient = plain.step(batch[:, 0], batch[:, 1], torch.from_numpy(plan.key_permutation(step)))
        losses.append(loss)
        gradients[1:] = [gradient]  # of the first and the last step, as `run_program` keeps them
    return {
        "losses": losses,
        "gradients": gradients,
        "query_encoder": {name: p.detach() for name, p in plain.f_q.named_parameters()},
        "key_encoder": {name: p.detach() for name, p in plain.f_k.named_parameters()},
        "running_q": plain.running["q"],
        "running_k": plain.running["k"],
        "queue": plain.queue,
        "queue_ptr": torch.tensor(plain.ptr),
    }


def differences(results, expected):
    """The largest difference of any rank, by what differs."""
    return {name: max(largest_difference(ours[name], expected[name]) for ours in results) for name in expected}


@pytest.mark.parametrize(("world_size", "accum"), [(2, 1), (2, 2)])
def test_equals_the_reference(world_size, accum):
    config = small_config(optim={"grad_accum_steps": accum})
    found = differences(run(run_program, world_size, config, STEPS), reference())
    assert max(found.values()) < 1e-10, found


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "accum"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (2, 2)])
def test_equals_the_reference_for_many_steps(world_size, accum):
    config = small_config(optim={"grad_accum_steps": accum})
    found = differences(run(run_program, world_size, config, MANY_STEPS), reference(MANY_STEPS))
    assert max(found.values()) < 1e-10, found


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
