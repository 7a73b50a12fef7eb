"""The learning rate as a pure function of the step."""

import math
from collections.abc import Sequence

from moco_dist.config.pretrain import OptimConfig


def peak_learning_rate(config: OptimConfig) -> float:
    """base_lr scaled to the batch."""
    ratio = config.global_batch_size / 256
    return config.base_lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.lr_scaling]


def learning_rate_formula(config: OptimConfig) -> str:
    """How the peak learning rate comes about, for a person."""
    ratio = f"{config.global_batch_size} / 256"
    factor = {"linear": f" x {ratio}", "sqrt": f" x sqrt({ratio})", "none": ""}[config.lr_scaling]
    return f"lr = {config.base_lr}{factor} = {peak_learning_rate(config):g}"


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of optimiser step `step` (from 0).

    cosine: peak (1 + cos(pi t / T)) / 2 (v2 sec. 3). step: peak x 0.1 at each milestone (v1 sec. 3.3). t is the
    whole epoch, as published, or with schedule_unit `step` the exact position. During warm-up: the peak times the
    share of the warm-up done, this step included.
    """
    peak = peak_learning_rate(config)
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    epoch = step / steps_per_epoch if config.schedule_unit == "step" else step // steps_per_epoch
    match config.schedule:
        case "cosine":
            return peak * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        case "step":
            return peak * step_decay(config.milestones, epoch)


def step_decay(milestones: Sequence[int], now: float, factor: float = 0.1) -> float:
    """A learning rate's factor at `now`, in the milestones' unit: one `factor` for each milestone that was reached."""
    return factor ** sum(now >= milestone for milestone in milestones)
