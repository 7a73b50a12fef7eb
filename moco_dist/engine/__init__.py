"""Backward and optimiser step behind one protocol."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """What the loop needs of an engine."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def __call__(self, images: Tensor, synchronise: bool = True) -> Tensor:
        """(N, 3, H, W) to q (N, C), with gradient."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        ...

    def step(self, lr: float) -> None:
        """One optimiser step, and fresh gradients."""
        ...
