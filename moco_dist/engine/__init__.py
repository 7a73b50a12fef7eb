"""Backward and optimiser step behind one protocol."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """What the loop and checkpoints need of an engine.

    Attributes:
        module: the query encoder without wrapping.
        optimizer: its optimiser.
        scaler: of the loss, where the encoders compute in float16.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def __call__(self, images: Tensor, synchronise: bool = True) -> Tensor:
        """(N, 3, H, W) to q (N, C), with gradient. `synchronise` is False for all but a step's last micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; with `synchronise`, their mean over ranks."""
        ...

    def step(self, lr: float, monitored: bool = False) -> dict[str, Tensor]:
        """One optimiser step at learning rate `lr`, times a parameter group's `lr_scale`, and fresh gradients.

        Returns:
            of a monitored step, scalars () for the log: `gradient_norm`, of all gradients before they are clipped.
        """
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as PARAMETER.KEY, whole tensors, equal on all ranks. Called by all ranks."""
        ...

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `optimizer_tensors` that were filled anew, and from weights that were written into `module`."""
        ...


def clip_gradients(module: nn.Module, most: float | None) -> Tensor:
    """The norm () of all gradients of `module`; where they have more than `most`, they are scaled down to it."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if most is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`Engine.optimizer_tensors` where each rank holds all of it: the live tensors."""
    return {
        f"{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
