"""DeepSpeed as the engine: ZeRO stages 0, 1 and 2 (arXiv 1910.02054). Imported only where it is chosen.

Parameters stay float32 and the forward runs under our own autocast, so the mathematics is that of the other engine.
DeepSpeed has no float64 (stage 0 refuses such gradients, stages 1 and 2 keep float32 weights), and a scaler for
float16 would have to know its partitions: both are refused by the config.

Stages 1 and 2 lay the parameters end to end in one buffer, which cannot be channels-last: convolutions rearrange their
weights at every call there (the activations stay channels-last).
"""

import importlib
import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from moco_dist.config.pretrain import EngineConfig
from moco_dist.distributed.collectives import all_gather, all_reduce_sum
from moco_dist.distributed.world import World
from moco_dist.engine import clip_gradients, whole_state
from moco_dist.engine.optimizer import LARS, Partition, make_buffers
from moco_dist.engine.precision import autocast
from moco_dist.engine.speed import compile_options
from moco_dist.errors import UserError

BUCKET_NUMBERS = 2**23  # gradients reduced at once; DeepSpeed's default would take 2 GB


class DeepSpeedEngine:
    """Forward, backward, gradient all-reduce and optimiser step by DeepSpeed; see `Engine`.

    Needs a process group, in a world of one too.
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
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"engine.kind deepspeed computes in bf16 or fp32, not in {dtype}; set optim.precision")
        self.module, self.optimizer, self._world = module, optimizer, world
        self._clip_grad_norm = clip_grad_norm
        self.scaler = torch.amp.GradScaler(torch.device(world.device).type, enabled=False)
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if config.compile != "off":
            module.compile(**compile_options(config))
        self._engine = _initialise(
            _UnderAutocast(module, dtype, world), optimizer, config.zero_stage, clip_grad_norm, world
        )
        optimizer.register_step_pre_hook(self._leave_out_if_not_finite)
        self._zero: Any = self._engine.optimizer if config.zero_stage else None
        if self._zero is None:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return
        make_buffers(optimizer)  # of this rank's part, which has taken the parameters' place
        if isinstance(optimizer, LARS):
            optimizer.partition = self._partition()

    def __call__(self, images: Tensor, synchronise: bool = True) -> Tensor:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(synchronise)
        return self._engine(images)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. Stage 2 reduces the gradients of every micro-batch, the others those of the step."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, monitored: bool = False) -> dict[str, Tensor]:
        """See `Engine`. The other stages than 0 take the norm of all parts themselves, and clip by it.

        They too leave out steps with gradients that are not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._zero is None:
            norm = clip_gradients(self.module, self._clip_grad_norm)
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self._engine.step()
        else:
            self._engine.step()
            norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self._world.device)
        return {"gradient_norm": norm} if monitored else {}

    def _leave_out_if_not_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """As GradScaler does in the other engine, tell the optimiser, on the device, to change nothing now.

        Where each rank holds a part of the gradients, an all-reduce of a number has all ranks do as one of them must.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found = torch.zeros((), device=self._world.device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones_like(found))
        optimizer.found_inf = found if self._zero is None else all_reduce_sum(found, self._world)  # type: ignore[attr-defined]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`. In stages 1 and 2 all parts come in one all-gather."""
        if self._zero is None:
            return whole_state(self.module, self.optimizer)
        tensors = {}
        for number, state in enumerate(self._states()):
            for key, part in state.items():
                pieces = self._by_name(all_gather(part, self._world), number) if part.ndim else {}
                # A number, such as AdamW's count of steps, is that of every parameter of the group.
                tensors |= {f"{name}.{key}": pieces.get(name, part) for name in self._places(number)}
        return tensors

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine`."""
        if self._zero is None:
            return
        for number, state in enumerate(self._states()):
            for key, part in state.items():
                if not part.ndim:
                    part.copy_(tensors[f"{next(iter(self._places(number)))}.{key}"])
                    continue
                whole = part.new_zeros(self._world.world_size * len(part))
                for name, piece in self._by_name(whole, number).items():
                    piece.copy_(tensors[f"{name}.{key}"])
                part.copy_(whole.chunk(self._world.world_size)[self._world.rank])
        self._zero.refresh_fp32_params()

    def _states(self) -> list[dict[str, Tensor]]:
        """The optimiser's state of this rank's part, for each group of parameters."""
        return [self.optimizer.state[part] for group in self.optimizer.param_groups for part in group["params"]]

    def _places(self, number: int) -> dict[str, int]:
        """Where in the buffer of a group's parameters each of them, by name, begins."""
        flat = self._zero.bit16_groups_flat[number]
        return {
            name: parameter.storage_offset() - flat.storage_offset()
            for name, parameter in self.module.named_parameters()
            if parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        }

    def _by_name(self, whole: Tensor, number: int) -> dict[str, Tensor]:
        """Views of a vector that is laid out as the buffer of a group's parameters."""
        parameters = dict(self.module.named_parameters())
        return {
            name: whole[place : place + parameters[name].numel()].view(parameters[name].shape)
            for name, place in self._places(number).items()
        }

    def _partition(self) -> Partition:
        """Which parameters this rank's part holds, and where."""
        parameters, size = list(self.module.parameters()), len(self._states()[0]["momentum_buffer"])
        start = self._world.rank * size
        pieces = []
        for number, (parameter, place) in enumerate(zip(parameters, self._places(0).values(), strict=True)):
            first, last = max(place - start, 0), min(place - start + parameter.numel(), size)
            if first < last:
                pieces.append((number, first, last))
        is_adapted = [p.ndim > 1 for p in parameters]
        return Partition(pieces, is_adapted, lambda x: all_reduce_sum(x, self._world), self._world.device)


class _UnderAutocast(nn.Module):
    """DeepSpeed switches off an autocast that is on around it."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, world: World) -> None:
        super().__init__()
        self.module, self._dtype, self._device = module, dtype, world.device

    def forward(self, images: Tensor) -> Tensor:
        with autocast(self._dtype, self._device):
            return self.module(images)


def _initialise(module: nn.Module, optimizer: torch.optim.Optimizer, zero_stage: int, clip: float | None, world: World):
    """deepspeed.DeepSpeedEngine around `module`, quietly."""
    device_type = torch.device(world.device).type
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    index = torch.device(world.device).index  # DeepSpeed takes LOCAL_RANK for that of the GPU
    os.environ["LOCAL_RANK"] = str(world.local_rank if index is None else index)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"engine.kind deepspeed: {error}; install it by pip install 'moco_dist[deepspeed]', or use engine.kind ddp"
        ) from error
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # torch 2.14 and later warn of the names by which DeepSpeed calls collectives.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device_type == "cpu":
        # DeepSpeed would compile, for a minute, an all-reduce through shared memory for inference.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # for its log alone
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": (clip or 0.0) if zero_stage else 0.0,  # its default is 1
        "zero_optimization": {
            "stage": zero_stage, "reduce_bucket_size": BUCKET_NUMBERS, "allgather_bucket_size": BUCKET_NUMBERS
        },
    }  # fmt: skip
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]
