"""From the loader's crops to what a step takes: both views coloured, on the device, each key view with its encoder."""

import contextlib
import time
from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.colours import apply_colours
from moco_dist.data.images import ImageFolder
from moco_dist.data.key_views import KeyExchange
from moco_dist.data.loaders import never, pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.transfer import on_device
from moco_dist.distributed.world import World
from moco_dist.errors import LoadingError


class Views(NamedTuple):
    """This rank's share of a step, on the device.

    Attributes:
        query: (B/W, 3, S, S) the views of its samples that are queries, in sample order.
        key: (B/W, 3, S, S) the key views that it encodes: of other samples (shuffled BN).
        key_order: int64 (B,), `Plan.key_permutation`: position i of the key batch holds sample position key_order[i].
        replaced: files that could not be read, with the reason; their successors took their places.
    """

    query: Tensor
    key: Tensor
    key_order: Tensor
    replaced: tuple[str, ...] = ()


def views_of_steps(
    images: ImageFolder,
    config: PretrainConfig,
    plan: Plan,
    world: World,
    start: int,
    stop: int,
    dtype: torch.dtype,
    colour: Callable[..., Tensor] = apply_colours,
    must_end: Callable[[], bool] = never,
    on_lost: Callable[[LoadingError], None] | None = None,
) -> Generator[tuple[Views, float], None, None]:
    """The views of steps start .. stop-1, each with the seconds that its crops were waited for. Close it.

    Run by all ranks alike: those that hold a block exchange key crops.

    Args:
        images: the training images.
        config: augmentation, loader, exchange.
        plan: who encodes what.
        world: this process.
        start: the first step.
        stop: one past the last.
        dtype: of the views.
        colour: `apply_colours`, compiled or not.
        must_end: as in `load`.
        on_lost: as in `load`.
    """
    device = torch.device(world.device)
    loader = pretrain_batches(images, config, plan, world, start, stop, must_end, on_lost)
    keys = KeyExchange(config, plan, world)
    with contextlib.closing(on_device(loader, device, must_end)) as arriving:
        batches = keys.exchanged(arriving, start)
        for step in range(start, stop):
            waiting_since = time.perf_counter()
            batch = next(batches)
            wait_seconds = time.perf_counter() - waiting_since
            query = colour(batch.view_q, batch.colours_q, config.augment, dtype)
            key = keys.coloured(batch, step, dtype, colour)
            yield Views(query, key, batch.key_order, batch.replaced), wait_seconds
