"""The program on 1, 2 and 4 ranks, with and without gradient accumulation, against plain float64 on one process."""

import functools

import pytest
import torch

from moco_dist.data.plan import Plan
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, run_program, small_config
from tests.reference import Reference, rate_of_epoch
from tests.world import run

STEPS = 6  # 6 x 64 keys go around the queue of 152 more than twice
MANY_STEPS = 20
# MoCo v1 and v2 (row (d)) where they differ within a step, over the whole of a schedule of 20 steps: 10 epochs of two.
VERSIONS = {
    "v1": {
        "model": {"head_hidden_dims": []},
        "moco": {"temperature": 0.07},
        "optim": {"epochs": 10, "schedule": "step", "milestones": [6, 8]},
    },
    "v2": {
        "model": {"head_hidden_dims": [24]},
        "moco": {"temperature": 0.2},
        "optim": {"epochs": 10, "schedule": "cosine"},
    },
}


@functools.cache
def reference(steps=STEPS, queue_size=152, version=None):
    """What plain PyTorch computes with the settings of `small_config`, or of one of VERSIONS over them."""
    config = small_config(**VERSIONS[version]) if version else small_config(moco={"queue_size": queue_size})
    hidden, optim = config.model.head_hidden_dims, config.optim
    milestones = optim.milestones if optim.schedule == "step" else None
    peak = optim.base_lr * optim.global_batch_size / 256
    start = run(run_program, 1, config, 0)[0]["initial"]
    plain = Reference(
        start["weights"], start["queue"], hidden=hidden[0] if hidden else None, dim=16,
        group=config.model.bn_group_size, momentum=config.moco.momentum, temperature=config.moco.temperature,
        sgd_momentum=optim.sgd_momentum, weight_decay=optim.weight_decay,
    )
    plan, table = Plan(NUM_SAMPLES, optim.global_batch_size, config.run.seed), images()
    losses, gradients = [], []
    for step in range(steps):
        batch = table[torch.from_numpy(plan.global_indices(step))]
        epoch = step // (NUM_SAMPLES // optim.global_batch_size)
        lr = rate_of_epoch(epoch, lr=peak, epochs=optim.epochs, milestones=milestones)
        loss, gradient = plain.step(batch[:, 0], batch[:, 1], torch.from_numpy(plan.key_permutation(step)), lr)
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


def test_v1_and_v2_differ():
    """Each schedule moves within the 20 steps, and the two heads and temperatures give other losses."""
    rates = {
        "v1": [rate_of_epoch(epoch, lr=1.0, epochs=10, milestones=(6, 8)) for epoch in range(10)],
        "v2": [rate_of_epoch(epoch, lr=1.0, epochs=10) for epoch in range(10)],
    }
    assert rates["v1"] == pytest.approx([1.0] * 6 + [0.1] * 2 + [0.01] * 2)
    assert (rates["v2"][0], rates["v2"][5]) == pytest.approx((1.0, 0.5))
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
