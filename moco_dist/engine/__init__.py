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

    def step(self, lr: float) -> None:
        """One optimiser step at learning rate `lr`, times a parameter group's `lr_scale`, and fresh gradients."""
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as PARAMETER.KEY, whole tensors, equal on all ranks. Called by all ranks."""
        ...

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `optimizer_tensors` that were filled anew, and from weights that were written into `module`."""
        ...


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`Engine.optimizer_tensors` where each rank holds all of it: the live tensors."""
    return {
        f"{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
