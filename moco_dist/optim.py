"""The optimisers, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from moco_dist.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD (v1 sec. 3.3: weight decay on every parameter) or LARS, with momentum buffers made (zero).

    Buffers that exist from the start can be saved and loaded at any step; zero gives the same first step.
    """
    parameters = list(module.parameters())
    if config.optimizer == "lars":
        optimizer: torch.optim.Optimizer = LARS(
            parameters, config.sgd_momentum, config.weight_decay, config.trust_coefficient
        )
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=0.0, momentum=config.sgd_momentum, weight_decay=config.weight_decay, foreach=True
        )
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as large-batch SSL uses it.

    Weights of two or more dimensions: d = g + wd w, scaled by trust |w| / |d| (1 where either norm is 0), then
    momentum and step. Biases and BatchNorm's parameters: plain momentum SGD without weight decay (SimCLR, arXiv
    2002.05709, sec. B.6).
    """

    def __init__(
        self, parameters: list[nn.Parameter], momentum: float, weight_decay: float, trust_coefficient: float
    ) -> None:
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(parameters, {"lr": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step, with one multi-tensor operation for each line of the formula."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
            adapted = [i for i, p in enumerate(parameters) if p.ndim > 1]
            weights = [parameters[i] for i in adapted]
            decayed = torch._foreach_add([updates[i] for i in adapted], weights, alpha=group["weight_decay"])
            norms = zip(torch._foreach_norm(weights), torch._foreach_norm(decayed), strict=True)
            trust = [
                torch.where((w > 0) & (d > 0), group["trust_coefficient"] * w / d, torch.ones_like(w))
                for w, d in norms
            ]
            for i, update in zip(adapted, torch._foreach_mul(decayed, trust), strict=True):
                updates[i] = update
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(parameters, buffers, alpha=-group["lr"])


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
    if config.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return peak * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
