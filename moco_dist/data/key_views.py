"""How a rank comes by the key views that it encodes: `shuffle.exchange`. All ways give the same views, bit for bit.

Received a rank and step, for N = B/W samples of S x S pixels:
    loader      0 bytes; a sample whose key is encoded elsewhere is decoded twice in the cluster
    all_to_all  (W - 1)/W N 3 S^2 bytes (uint8); every sample is decoded once
    all_gather  (W - 1) N 12 S^2 bytes (float32); what is usually done, here to be measured against
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.batch import CropBatch, to_device
from moco_dist.data.colours import apply_colours
from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import all_gather, all_to_all_rows
from moco_dist.distributed.world import World


def key_views(
    batch: CropBatch, config: PretrainConfig, plan: Plan, step: int, world: World, dtype: torch.dtype,
    colour: Callable[..., Tensor] = apply_colours,
) -> Tensor:
    """(B/W, 3, S, S) of `dtype`: the coloured key views of `plan.key_indices(step, world)`, in that order.

    `colour` is `apply_colours`, compiled or not.
    """
    exchange = config.shuffle.exchange
    if exchange == "all_gather":
        own = colour(batch.view_k, batch.colours_k, config.augment, torch.promote_types(dtype, torch.float32))
        rows = plan.key_permutation(step).reshape(world.world_size, -1)[world.rank]
        gathered = all_gather(own.permute(0, 2, 3, 1), world)[to_device(rows, own.device)]
        return gathered.permute(0, 3, 1, 2).to(dtype)
    crops = batch.view_k
    if exchange == "all_to_all":
        route = plan.key_route(step, world)
        send = crops.permute(0, 2, 3, 1)[to_device(route.send_rows, crops.device)]
        received = all_to_all_rows(send, route.send_counts, route.receive_counts, world)
        crops = torch.empty_like(received)
        crops[to_device(route.receive_rows, crops.device)] = received
        crops = crops.permute(0, 3, 1, 2)
    return colour(crops, batch.colours_k, config.augment, dtype)
