"""The method that a config names, at step 0."""

from collections.abc import Callable

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.engine.speed import keep_freed_memory, set_backends
from moco_dist.method.moco import MoCo
from moco_dist.method.simclr import SimCLR
from moco_dist.method.step import Method

METHODS: dict[str, Callable[[PretrainConfig, World], Method]] = {"moco": MoCo, "simclr": SimCLR}


def build_method(config: PretrainConfig, world: World) -> Method:
    """The method of `config` on this rank, its weights and queue those of the seed. Called by all ranks."""
    set_backends(config.engine)
    keep_freed_memory(world.device)
    return METHODS[config.method](config, world)
