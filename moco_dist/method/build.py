"""The method that a config names, at step 0."""

from collections.abc import Callable

import torch

from moco_dist.config.architectures import is_known_without_torch
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.engine.speed import keep_freed_memory, set_backends
from moco_dist.errors import UserError
from moco_dist.method.backbone import has_batch_norm
from moco_dist.method.encoder import Encoder
from moco_dist.method.moco import MoCo
from moco_dist.method.simclr import SimCLR
from moco_dist.method.step import Method

METHODS: dict[str, Callable[[PretrainConfig, World], Method]] = {"moco": MoCo, "simclr": SimCLR}


def settled(config: PretrainConfig) -> PretrainConfig:
    """The config with what only the network can tell: without BatchNorm keys are not shuffled (shuffle.block_size 1).

    Raises:
        UserError: there is no such network, no step can be made with it, or it needs the shuffle that is switched off.
    """
    if is_known_without_torch(config.model.arch):
        return config
    with torch.device("meta"):
        has_norm = has_batch_norm(Encoder(config.model, config.data.image_size))
    if has_norm and config.shuffle.block_size == 1:
        raise UserError(f"shuffle.block_size 1: model.arch {config.model.arch} has BatchNorm, by whose statistics a "
                        "query would know its key; leave it out")  # fmt: skip
    if has_norm:
        return config
    return config.model_copy(update={"shuffle": config.shuffle.model_copy(update={"block_size": 1})})


def build_method(config: PretrainConfig, world: World) -> Method:
    """The method of `config` on this rank, its weights and queue those of the seed. Called by all ranks."""
    set_backends(config.engine)
    keep_freed_memory(world.device)
    return METHODS[config.method](config, world)
