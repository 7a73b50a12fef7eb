"""What the program's steps have to come out at: plain float64 PyTorch on one process, with the same settings."""

import functools

import torch

from moco_dist.data.plan import plan_of
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, run_program, small_config
from tests.reference import Reference, rate_of_epoch
from tests.world import run

STEPS = 6  # 6 x 64 keys go around the queue of 152 more than twice
MANY_STEPS = 10
# MoCo v1 and v2 (row (d)) where they differ within a step, over the whole of a schedule of 10 steps: 5 epochs of two.
VERSIONS = {
    "v1": {
        "model": {"head_hidden_dims": []},
        "moco": {"temperature": 0.07},
        "optim": {"epochs": 5, "schedule": "step", "milestones": [3, 4]},
    },
    "v2": {
        "model": {"head_hidden_dims": [24]},
        "moco": {"temperature": 0.2},
        "optim": {"epochs": 5, "schedule": "cosine"},
    },
}


@functools.cache
def reference(steps=STEPS, queue_size=152, version=None, block=None, filling=()):
    """What plain PyTorch computes with the settings of `small_config`, or of one of VERSIONS over them.

    `filling`: the steps whose keys fill the queue first.
    """
    config = small_config(moco={"queue_size": queue_size}, shuffle={"block_size": block})
    config = small_config(**VERSIONS[version]) if version else config
    hidden, optim = config.model.head_hidden_dims, config.optim
    milestones = optim.milestones if optim.schedule == "step" else None
    peak = optim.base_lr * optim.global_batch_size / 256
    start = run(run_program, 1, config, 0)[0]["initial"]
    plain = Reference(
        start["weights"],
        start["queue"],
        hidden=hidden[0] if hidden else None,
        dim=16,
        group=config.model.bn_group_size,
        momentum=config.moco.momentum,
        temperature=config.moco.temperature,
        sgd_momentum=optim.sgd_momentum,
        weight_decay=optim.weight_decay,
    )
    plan, table = plan_of(config, NUM_SAMPLES), images()
    losses, gradients = [], []
    of_filling = [table[torch.from_numpy(plan.global_indices(step))][:, 1] for step in filling]
    plain.fill(zip(of_filling, (torch.from_numpy(plan.key_permutation(step)) for step in filling), strict=True))
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
