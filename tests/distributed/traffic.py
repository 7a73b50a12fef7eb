"""What a step of the program sends, seen where torch dispatches its collectives."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moco_dist.data.batch import CropBatch
from moco_dist.data.colours import COLOUR_COLUMNS
from moco_dist.data.key_views import KeyExchange
from moco_dist.data.plan import plan_of
from moco_dist.data.views import Views
from moco_dist.method.build import build_method
from tests.distributed.program import NUM_SAMPLES, SIDE


class Collectives(TorchDispatchMode):
    """Notes every collective of this rank, by whomever it is called, as (name, bytes of its largest tensor list)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.startswith("c10d::"):
            size = max(sum(x.nbytes for x in _tensors(arg)) for arg in args)
            self.seen.append((func._schema.name.removeprefix("c10d::").strip("_"), size))
        return func(*args, **(kwargs or {}))


def _tensors(nest):
    if isinstance(nest, torch.Tensor):
        return [nest]
    return [x for part in nest for x in _tensors(part)] if isinstance(nest, list | tuple) else []


def collectives_of_a_step(world, config):
    """Of the third step, key views and all: DDP arranges its buckets anew in the second, with a broadcast."""
    method = build_method(config, world)
    plan = plan_of(config, NUM_SAMPLES)
    per_rank = config.optim.global_batch_size // world.world_size
    crops = torch.zeros(per_rank, 3, SIDE, SIDE, dtype=torch.uint8).to(memory_format=torch.channels_last)
    samples, colours = torch.zeros(per_rank, dtype=torch.int64), torch.zeros(per_rank, len(COLOUR_COLUMNS))
    batch = CropBatch(crops, crops, samples, samples, colours, colours, samples)
    view_q = torch.randn(per_rank, 3, SIDE, SIDE)
    keys = KeyExchange(config, plan, world)
    for step in range(3):
        with Collectives() as both:
            (exchanged,) = keys.exchanged(iter([batch]), step)
            view_k = keys.coloured(exchanged, step, torch.float32)
            order = torch.from_numpy(plan.key_permutation(step))
            method.train_step(Views(view_q, view_k, order), 0.1, False)
    return both.seen, sum(p.nbytes for p in method.query_encoder.parameters())
