"""Runs the program's own step on any number of ranks, on data that tests make."""

import numpy as np
import torch

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.plan import filling_steps, plan_of
from moco_dist.data.views import Views
from moco_dist.distributed.collectives import gather_uneven
from moco_dist.engine.schedule import learning_rate
from moco_dist.method.build import build_method
from moco_dist.run.checkpoint import averaged
from moco_dist.run.saver import Saver

NUM_SAMPLES, SIDE = 160, 16


def small_config(**overrides):
    """A ResNet-10 in float64, a batch of 64 in BN groups of 8, and a queue that a batch doesn't divide."""
    values = {
        "run": {"dir": "unused", "seed": 3},
        "data": {"root": "unused"},
        "model": {"arch": "resnet10", "head_hidden_dims": [24], "embedding_dim": 16, "bn_group_size": 8},
        "moco": {"queue_size": 152, "momentum": 0.9, "temperature": 0.2},
        "optim": {
            "global_batch_size": 64,
            "base_lr": 0.1,
            "precision": "fp64",
            "epochs": 1000,
            "schedule": "step",
            "milestones": [999],
        },
    }
    for section, settings in overrides.items():
        values[section] = {**values.get(section, {}), **settings}
    return PretrainConfig.model_validate(values)


def images(dtype=torch.float64, side=SIDE):
    """(NUM_SAMPLES, 2 views, 3, side, side): every sample another picture, its two views alike."""
    generator = torch.Generator().manual_seed(11)
    picture = torch.randn(NUM_SAMPLES, 1, 3, side, side, generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM_SAMPLES, 2, 3, side, side, generator=generator, dtype=torch.float64)
    return (picture + 0.3 * noise).to(dtype)


def views_at(table, plan, step, world):
    """This rank's `Views` of a step, out of (samples, 2 views, 3, S, S)."""
    query = table[torch.from_numpy(plan.query_indices(step, world)), 0]
    key = table[torch.from_numpy(plan.key_indices(step, world)), 1]
    return Views(query, key, torch.from_numpy(plan.key_permutation(step)))


def saver_for(run_dir, world, say=print, keep_last=2, keep_every_steps=0, facts=None):
    """A Saver of a run that has no end."""
    config = small_config(
        run={"dir": run_dir}, checkpoint={"keep_last": keep_last, "keep_every_epochs": int(bool(keep_every_steps))}
    )
    facts = {"config": config.model_dump(mode="json"), **(facts or {})}
    return Saver(config, facts, keep_every_steps, -1, world, say)


def run_program(world, config, steps, mutate=None):
    """Losses of each step, gradients of the first and the last, norms, and the state after it, alike on all ranks."""
    if mutate is not None:
        mutate()
    method = build_method(config, world)
    plan = plan_of(config, NUM_SAMPLES)
    initial = {
        "weights": {name: p.detach().clone() for name, p in method.query_encoder.named_parameters()},
        "queue": gather_uneven(method.queue.keys, world).clone(),
    }
    gradients = []
    named = dict(method.query_encoder.named_parameters())

    def remember(*_):  # 40 MB a step, on each of eight ranks: not those of all steps
        gradients[1:] = [{name: p.grad.clone() for name, p in named.items() if p.grad is not None}]

    method.engine.optimizer.register_step_pre_hook(remember)
    table = images(next(method.query_encoder.parameters()).dtype)
    if steps and (filling := filling_steps(config, plan)):
        method.fill_queue(views_at(table, plan, step, world) for step in filling)
    losses, norms = [], []
    for step in range(steps):
        views = views_at(table, plan, step, world)
        lr = learning_rate(config.optim, step, plan.steps_per_epoch)
        result = method.train_step(views, lr, step % 2 == 0)
        losses.append(gather_uneven(result.loss[None], world).mean().item())
        norms += [result.scalars["gradient_norm"].item()] if result.scalars else []
    return {
        "initial": initial,
        "losses": losses,
        "gradients": gradients,
        "gradient_norms": norms,
        "query_encoder": {name: p.detach().clone() for name, p in named.items()},
        "key_encoder": {name: p.detach().clone() for name, p in method.key_encoder.named_parameters()},
        "running_q": averaged(method.query_encoder, world),
        "running_k": averaged(method.key_encoder, world),
        "queue": gather_uneven(method.queue.keys, world),
        "queue_ptr": method.queue.ptr.clone(),
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
