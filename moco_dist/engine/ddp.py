"""DistributedDataParallel as the engine; in a world of one, the plain module."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco_dist.config.pretrain import EngineConfig
from moco_dist.distributed.world import World
from moco_dist.engine import clip_gradients, whole_state
from moco_dist.engine.optimizer import LARS
from moco_dist.engine.precision import autocast
from moco_dist.engine.speed import compile_options


class DDPEngine:
    """Forward under autocast, backward, gradient all-reduce, optimiser step; see `Engine`.

    DDP's static graph is left off. It would save a search for parameters without gradient, which is off already, and
    in the first step it would reduce no gradient until all of them are there.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        config: EngineConfig,
        world: World,
        clip_grad_norm: float | None = None,
    ) -> None:
        self.module, self.optimizer, self._dtype, self._world = module, optimizer, dtype, world
        self._clip_grad_norm = clip_grad_norm
        # Every precision has a scaler, though only float16 needs its scale: it looks for gradients that are not finite,
        # on the device, and such a step leaves weights and momentum as they are. It looks after the all-reduce, so
        # all ranks skip a step or none does.
        init_scale, growth_interval = (2.0**16, 2000) if dtype == torch.float16 else (1.0, 2**31 - 1)
        self.scaler = torch.amp.GradScaler(
            torch.device(world.device).type, init_scale=init_scale, growth_interval=growth_interval
        )
        self._ddp: nn.Module = module
        if world.world_size > 1:
            # BatchNorm's running statistics are averaged when they are needed, not broadcast at every step.
            with warnings.catch_warnings():
                # torch 2.15 prefers forward_sync_buffers, which torch 2.11 does not know.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self._ddp = DistributedDataParallel(
                    module,
                    device_ids=[torch.device(world.device)] if world.device != "cpu" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
        if config.compile != "off":
            # DDP, not the module in it: the compiler then cuts the graph at the gradient buckets, so that they are
            # reduced while the rest of the backward pass runs.
            self._ddp.compile(**compile_options(config))
        if config.compile == "step" and isinstance(optimizer, LARS):
            optimizer.compile()

    def __call__(self, images: Tensor, synchronise: bool = True) -> Tensor:
        """See `Engine`."""
        if self._world.world_size > 1:
            self._ddp.require_backward_grad_sync = synchronise  # type: ignore[assignment]
        with autocast(self._dtype, self._world.device):
            return self._ddp(images)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float, monitored: bool = False) -> dict[str, Tensor]:
        """See `Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.scaler.unscale_(self.optimizer)
        scalars = {}
        if monitored or self._clip_grad_norm is not None:
            norm = clip_gradients(self.module, self._clip_grad_norm)
            scalars = {"gradient_norm": norm} if monitored else {}
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return scalars

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return whole_state(self.module, self.optimizer)

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to do: the tensors are the optimiser's own."""
