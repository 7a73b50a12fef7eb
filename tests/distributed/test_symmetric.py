"""The symmetric loss on any number of ranks and micro-batches: what plain PyTorch on one process computes."""

import functools

import pytest
import torch
import torch.nn.functional as F

from moco_dist.data.plan import Plan, filling_steps
from moco_dist.engine.schedule import peak_learning_rate
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, run_program, small_config
from tests.reference import encode, plain_encoder
from tests.world import run

STEPS = 3


def config(accum=1, queue_start="random"):
    moco = {
        "queue_size": 152, "momentum": 0.9, "temperature": 0.2, "symmetric": True, "queue_start": queue_start,
    }  # fmt: skip
    return small_config(moco=moco, optim={"grad_accum_steps": accum})


@functools.cache
def plain(queue_start="random"):
    """Two losses a step, each with the other view as its key; K x N logits, one row of the queue after the other."""
    c = config(queue_start=queue_start)
    start = run(run_program, 1, c, 0)[0]["initial"]
    f_q, f_k = (plain_encoder(24, 16, start["weights"]) for _ in range(2))
    sgd = torch.optim.SGD(f_q.parameters(), lr=peak_learning_rate(c.optim), momentum=0.9, weight_decay=1e-4)
    queue, ptr, losses = start["queue"].clone(), 0, []
    plan, table = Plan(NUM_SAMPLES, 64, c.run.seed), images()

    def keys_of(x, order):
        with torch.no_grad():
            return encode(f_k, x[order, 1], 8)[order.argsort()], encode(f_k, x[:, 0], 8)

    def enqueue(keys):
        nonlocal ptr
        for key in torch.cat(keys):
            queue[ptr] = key
            ptr = (ptr + 1) % len(queue)

    def batch_of(step):
        return table[torch.from_numpy(plan.global_indices(step))], torch.from_numpy(plan.key_permutation(step))

    for step in filling_steps(c, plan):
        enqueue(keys_of(*batch_of(step)))
    for step in range(STEPS):
        x, order = batch_of(step)
        with torch.no_grad():
            for p_q, p_k in zip(f_q.parameters(), f_k.parameters(), strict=True):
                p_k.copy_(0.9 * p_k + 0.1 * p_q)
        k_of_second, k_of_first = keys_of(x, order)
        q_of_first, q_of_second = encode(f_q, x[:, 0], 8), encode(f_q, x[order, 1], 8)[order.argsort()]
        loss = 0
        for q, k in ((q_of_first, k_of_second), (q_of_second, k_of_first)):
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.2
            loss = loss + F.cross_entropy(logits, torch.zeros(64, dtype=torch.int64)) / 2
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
        enqueue((k_of_second, k_of_first))
    weights = [{name: p.detach() for name, p in f.named_parameters()} for f in (f_q, f_k)]
    return {"losses": losses, "query_encoder": weights[0], "key_encoder": weights[1], "queue": queue,
            "queue_ptr": torch.tensor(ptr)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "accum", "queue_start"), [(1, 1, "random"), (2, 2, "random"), (4, 1, "random"), (2, 2, "keys")]
)
def test_equals_the_plain_step(world_size, accum, queue_start):
    for ours in run(run_program, world_size, config(accum, queue_start), STEPS):
        for name, expected in plain(queue_start).items():
            assert largest_difference(ours[name], expected) < 1e-10, name


def test_the_queue_has_to_hold_both_keys_of_a_sample():
    with pytest.raises(ValueError, match=r"less than the 128 keys of one step .*moco.symmetric\); 128 is the smallest"):
        small_config(moco={"queue_size": 100, "symmetric": True})
