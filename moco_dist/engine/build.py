"""The engine that a config names, around an encoder."""

import torch
from torch import nn

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.engine import Engine
from moco_dist.engine.ddp import DDPEngine
from moco_dist.engine.optimizer import build_optimizer
from moco_dist.engine.precision import compute_dtype


def build_engine(encoder: nn.Module, config: PretrainConfig, world: World) -> Engine:
    """The engine with its optimiser; it may lay out the encoder's weights anew. Called by all ranks."""
    dtype = compute_dtype(config.optim.precision, world.device)
    optimizer = build_optimizer(encoder, config.optim)
    if config.engine.kind == "deepspeed":
        from moco_dist.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(encoder, optimizer, dtype, config.engine, world, config.optim.clip_grad_norm)
    return DDPEngine(encoder, optimizer, dtype, config.engine, world, config.optim.clip_grad_norm)


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights, queue and momentum, where encoders compute in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
