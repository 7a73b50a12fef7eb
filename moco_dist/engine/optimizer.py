"""The optimisers."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moco_dist.config.pretrain import OptimConfig

# What the parameters are usually called that only tell places apart, or scale a branch.
NOT_DECAYED = ("pos_embed", "cls_token", "class_token", "relative_position_bias", "layer_scale")


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD (v1 sec. 3.3: weight decay on every parameter), LARS, or AdamW, with their buffers made (zero).

    Buffers that exist from the start can be saved and loaded at any step; zero gives the same first step.
    """
    parameters = list(module.parameters())
    if config.optimizer == "lars":
        optimizer: torch.optim.Optimizer = LARS(
            parameters, config.sgd_momentum, config.weight_decay, config.trust_coefficient
        )
    elif config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(decay_groups(module, config.weight_decay), lr=0.0, fused=True)
        make_buffers(optimizer)
    else:
        # Fused: weights, gradients and buffers are read once, two of them written: 20 bytes a float32 parameter.
        optimizer = torch.optim.SGD(
            parameters, lr=0.0, momentum=config.sgd_momentum, weight_decay=config.weight_decay, fused=True
        )
        make_buffers(optimizer)
    return optimizer


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for AdamW: norms, biases, position embeddings and class tokens without weight decay.

    Norms and biases are the parameters of one dimension; the others a network names itself, as timm's do, or by the
    usual names.
    """
    own = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        for name in getattr(part, "no_weight_decay", set)()
    }
    named = dict(module.named_parameters())
    without = {
        name for name, p in named.items()
        if p.ndim <= 1 or name in own or name.rpartition(".")[2].startswith(NOT_DECAYED)
    }  # fmt: skip
    return [
        {"params": [p for name, p in named.items() if name not in without], "weight_decay": weight_decay},
        {"params": [p for name, p in named.items() if name in without], "weight_decay": 0.0},
    ]


def make_buffers(optimizer: torch.optim.Optimizer) -> None:
    """Zero buffers for the optimiser's parameters, in place of any state it has."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, torch.optim.AdamW):
                averages = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                state = {"step": torch.zeros((), device=parameter.device), **averages}
            else:
                state = {"momentum_buffer": torch.zeros_like(parameter)}
            optimizer.state[parameter].update(state)


@dataclass(frozen=True)
class Partition:
    """What a rank holds of all parameters laid end to end and cut into W parts, as ZeRO does it.

    Attributes:
        pieces: of each parameter that the part touches: its number, and its first and past-last place in the part.
        is_adapted: of each parameter, of this part or another, whether LARS adapts its rate.
        sum_over_ranks: makes a tensor its sum over all ranks.
        device: where the parameters are.
    """

    pieces: list[tuple[int, int, int]]
    is_adapted: list[bool]
    sum_over_ranks: Callable[[Tensor], Tensor]
    device: str

    @functools.cached_property
    def adapted(self) -> dict[int, int]:
        """Which pieces, by their place in `pieces`, have their rate adapted, and the numbers of their parameters."""
        return {i: number for i, (number, _, _) in enumerate(self.pieces) if self.is_adapted[number]}

    @functools.cached_property
    def _numbers(self) -> Tensor:
        return torch.tensor(list(self.adapted.values()), dtype=torch.int64, device=self.device)

    def norms_of_whole(self, norms: Tensor) -> Tensor:
        """Turn norms (2, n) of the adapted pieces into those of their whole parameters, by one small all-reduce."""
        squares = norms.new_zeros(2, len(self.is_adapted)).index_copy_(1, self._numbers, norms.square())
        return self.sum_over_ranks(squares).sqrt()[:, self._numbers]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as large-batch SSL uses it.

    Weights of two or more dimensions: d = g + wd w, scaled by trust |w| / |d| (1 where either norm is 0), then
    momentum and step. Biases and BatchNorm's parameters: plain momentum SGD without weight decay (SimCLR, arXiv
    2002.05709, sec. B.6).

    Attributes:
        partition: what the one flat parameter that ZeRO leaves a rank is made of; None where parameters are whole.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets `found_inf` instead of asking the device

    def __init__(
        self, parameters: list[nn.Parameter], momentum: float, weight_decay: float, trust_coefficient: float
    ) -> None:
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(parameters, {"lr": 0.0, **defaults})
        self.partition: Partition | None = None
        make_buffers(self)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step, with one multi-tensor operation for each line of the formula."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            weights: list[Tensor] = list(parameters)
            updates: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
            buffers: list[Tensor] = [self.state[p]["momentum_buffer"] for p in parameters]
            if self.partition is None:
                adapted = [i for i, p in enumerate(parameters) if p.ndim > 1]
            else:
                pieces = self.partition.pieces
                weights, updates, buffers = (
                    [flat[first:last] for _, first, last in pieces] for (flat,) in (weights, updates, buffers)
                )
                adapted = list(self.partition.adapted)
            # Tensors, so that a compiled update is the same for every rate, and made on the device: nobody waits.
            rate, momentum = (weights[0].new_full((), group[name]) for name in ("lr", "momentum"))
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            self._update(weights, updates, buffers, adapted, rate, momentum, group["weight_decay"],
                         group["trust_coefficient"], found_inf)  # fmt: skip

    def compile(self) -> None:
        """Fuse the lines of the formula by torch.compile: 7 tensors read or written a parameter instead of 19."""
        self._update = torch.compile(self._update, dynamic=False)  # type: ignore[method-assign]

    def _update(
        self,
        weights: list[Tensor],
        updates: list[Tensor],
        buffers: list[Tensor],
        adapted: list[int],
        rate: Tensor,
        momentum: Tensor,
        weight_decay: float,
        trust_coefficient: float,
        found_inf: Tensor | None,
    ) -> None:
        """One step in place; the tensors `adapted` have their rate adapted."""
        w = [weights[i] for i in adapted]
        d = list(torch._foreach_add([updates[i] for i in adapted], w, alpha=weight_decay))
        norms = torch.stack([torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(d))])
        if self.partition is not None:
            norms = self.partition.norms_of_whole(norms)
        trust = torch.where((norms > 0).all(0), trust_coefficient * norms[0] / norms[1], 1)
        updates = list(updates)
        for i, update in zip(adapted, torch._foreach_mul(d, list(trust.unbind())), strict=True):
            updates[i] = update
        if found_inf is not None:  # then nothing changes, and the host need not know
            is_finite = found_inf == 0
            updates = [torch.where(is_finite, update, 0.0) for update in updates]
            keep = is_finite.to(rate.dtype)
            momentum, rate = momentum * keep + (1 - keep), rate * keep
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        torch._foreach_sub_(weights, torch._foreach_mul(buffers, rate))
