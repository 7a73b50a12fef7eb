"""DistributedDataParallel as the engine; in a world of one, the plain module."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco_dist.distributed.world import World
from moco_dist.method.precision import autocast


class DDPEngine:
    """Forward under autocast, backward, gradient all-reduce, optimiser step.

    Attributes:
        module: the query encoder without wrapping.
        optimizer: its optimiser.
        scaler: of the loss, where the encoders compute in float16.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, world: World
    ) -> None:
        self.module, self.optimizer, self._dtype, self._world = module, optimizer, dtype, world
        self.scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
        self._ddp: nn.Module = module
        if world.world_size > 1:
            # BatchNorm's running statistics are averaged when they are needed, not broadcast at every step.
            with warnings.catch_warnings():
                # torch 2.15 prefers forward_sync_buffers, which torch 2.11 does not know.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self._ddp = DistributedDataParallel(
                    module,
                    device_ids=[world.local_rank] if world.device != "cpu" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )

    def __call__(self, images: Tensor, synchronise: bool = True) -> Tensor:
        """(N, 3, H, W) to q (N, C). `synchronise` is False for all but the last micro-batch of a step."""
        if self._world.world_size > 1:
            self._ddp.require_backward_grad_sync = synchronise  # type: ignore[assignment]
        with autocast(self._dtype, self._world.device):
            return self._ddp(images)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; with `synchronise`, their mean over ranks."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float) -> None:
        """One optimiser step at learning rate `lr`, and fresh gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
