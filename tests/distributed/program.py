"""Runs the program's own step on any number of ranks, on data that tests make."""

import numpy as np
import torch

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import gather_uneven
from moco_dist.engine.schedule import learning_rate
from moco_dist.run.checkpoint import averaged
from moco_dist.train import build, train_step

NUM_SAMPLES, SIDE = 160, 24


def small_config(**overrides):
    """A ResNet-10 in float64, a batch of 64 in BN groups of 8, and a queue that a batch doesn't divide."""
    values = {
        "run": {"dir": "unused", "seed": 3},
        "data": {"root": "unused"},
        "model": {"arch": "resnet10", "head_hidden_dims": [24], "embedding_dim": 16, "bn_group_size": 8},
        "moco": {"queue_size": 152, "momentum": 0.9, "temperature": 0.2},
        "optim": {"global_batch_size": 64, "base_lr": 0.1, "precision": "fp64", "epochs": 1000,
                  "schedule": "step", "milestones": [999]},
    }
    for section, settings in overrides.items():
        values[section] = {**values.get(section, {}), **settings}
    return PretrainConfig.model_validate(values)


def images(dtype=torch.float64):
    """(NUM_SAMPLES, 2 views, 3, SIDE, SIDE): every sample another picture, its two views alike."""
    generator = torch.Generator().manual_seed(11)
    picture = torch.randn(NUM_SAMPLES, 1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM_SAMPLES, 2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return (picture + 0.3 * noise).to(dtype)


def run_program(world, config, steps, mutate=None):
    """Losses of each step, gradients of the first and the last, and the state after it, the same on all ranks."""
    if mutate is not None:
        mutate()
    state, engine = build(config, world)
    plan = Plan(NUM_SAMPLES, config.optim.global_batch_size, config.run.seed)
    initial = {
        "weights": {name: p.detach().clone() for name, p in state.query_encoder.named_parameters()},
        "queue": gather_uneven(state.queue.keys, world).clone(),
    }
    gradients = []
    named = dict(state.query_encoder.named_parameters())

    def remember(*_):  # 40 MB a step, on each of eight ranks: not those of all steps
        gradients[1:] = [{name: p.grad.clone() for name, p in named.items() if p.grad is not None}]

    engine.optimizer.register_step_pre_hook(remember)
    table = images(next(state.query_encoder.parameters()).dtype)
    losses = []
    for step in range(steps):
        view_q = table[torch.from_numpy(plan.query_indices(step, world)), 0]
        view_k = table[torch.from_numpy(plan.key_indices(step, world)), 1]
        order = torch.from_numpy(plan.key_permutation(step))
        lr = learning_rate(config.optim, step, plan.steps_per_epoch)
        result = train_step(state, engine, config, view_q, view_k, order, lr, step % 2 == 0, world)
        losses.append(gather_uneven(result.loss[None], world).mean().item())
    return {
        "initial": initial,
        "losses": losses,
        "gradients": gradients,
        "query_encoder": {name: p.detach().clone() for name, p in named.items()},
        "key_encoder": {name: p.detach().clone() for name, p in state.key_encoder.named_parameters()},
        "running_q": averaged(state.query_encoder, world),
        "running_k": averaged(state.key_encoder, world),
        "queue": gather_uneven(state.queue.keys, world),
        "queue_ptr": state.queue.ptr.clone(),
    }


def largest_difference(a, b):
    """The largest absolute difference between two nests of numbers and tensors; inf where shapes differ."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list):
        assert len(a) == len(b)
        return max((largest_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    a, b = torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b))
    if a.shape != b.shape:
        return float("inf")
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
