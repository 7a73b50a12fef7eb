"""Collectives on ranks that all hold something else, and the bytes that one step moves."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moco_dist.data.batch import CropBatch
from moco_dist.data.colours import COLOURS
from moco_dist.data.key_views import key_views
from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import (
    all_gather,
    all_reduce_sum,
    as_sharded,
    gather_uneven,
    reduce_scatter_sum,
    shard_bounds,
)
from moco_dist.distributed.world import World
from moco_dist.train import build, train_step
from tests.distributed.program import NUM_SAMPLES, SIDE, small_config
from tests.world import run


def each_collective(world):
    x = torch.arange(6.0).view(3, 2) + 100 * world.rank
    whole = torch.arange(4.0 * world.world_size).view(-1, 2) * (world.rank + 1)
    return {
        "gathered": all_gather(x, world),
        "scattered": reduce_scatter_sum(whole, world),
        "reduced": all_reduce_sum(x, world),
        "uneven": gather_uneven(x[: world.rank], world),
        "untouched": x,
    }


def test_ranks_with_different_data():
    for world_size in (1, 2, 3):
        results = run(each_collective, world_size)
        inputs = [torch.arange(6.0).view(3, 2) + 100 * rank for rank in range(world_size)]
        ranks_sum = world_size * (world_size + 1) // 2
        summed = torch.arange(4.0 * world_size).view(-1, 2) * ranks_sum
        for rank, result in enumerate(results):
            torch.testing.assert_close(result["gathered"], torch.cat(inputs))
            torch.testing.assert_close(result["reduced"], torch.stack(inputs).sum(0))
            torch.testing.assert_close(result["scattered"], summed.chunk(world_size)[rank])
            torch.testing.assert_close(result["untouched"], inputs[rank])
            if world_size > 1:
                torch.testing.assert_close(result["uneven"], torch.cat([x[:r] for r, x in enumerate(inputs)]))


def local_rows(world, total):
    start, stop = shard_bounds(total, world)
    shard = torch.arange(start, stop)[:, None].float()
    whole = as_sharded(shard, total, world)
    return start, stop, whole.full_tensor() if world.world_size > 1 else whole


def test_shards_follow_dtensors_rule():
    for world_size, total in ((1, 7), (2, 7), (4, 7), (4, 5)):
        for start, stop, whole in run(local_rows, world_size, total):
            assert 0 <= start <= stop <= total
            assert whole.flatten().tolist() == list(range(total))


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


def config_of(way, optimizer="sgd"):
    return small_config(optim={"precision": "fp32", "optimizer": optimizer, "grad_accum_steps": 1},
                        shuffle={"exchange": way})  # fmt: skip


def collectives_of_a_step(world, config):
    """Of the third step, key views and all: DDP arranges its buckets anew in the second, with a broadcast."""
    state, engine = build(config, world)
    plan = Plan(NUM_SAMPLES, config.optim.global_batch_size, config.run.seed)
    per_rank = config.optim.global_batch_size // world.world_size
    crops = torch.zeros(per_rank, 3, SIDE, SIDE, dtype=torch.uint8).to(memory_format=torch.channels_last)
    samples, colours = torch.zeros(per_rank, dtype=torch.int64), torch.zeros(per_rank, len(COLOURS))
    batch = CropBatch(crops, crops, samples, samples, colours, colours)
    view_q = torch.randn(per_rank, 3, SIDE, SIDE)
    for step in range(3):
        with Collectives() as both:
            view_k = key_views(batch, config, plan, step, world, torch.float32)
            order = torch.from_numpy(plan.key_permutation(step))
            train_step(state, engine, config, view_q, view_k, order, 0.1, False, world)
    return both.seen, sum(p.nbytes for p in state.query_encoder.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_step_is_two_small_collectives_and_the_gradients(optimizer):
    """No image crosses the network: a few kB of features where the images would be 64 times as much."""
    world_size = 4
    config = config_of("loader", optimizer)
    for seen, parameters in run(collectives_of_a_step, world_size, config):
        batch, dim = config.optim.global_batch_size, config.model.embedding_dim
        small = [collective for collective in seen if collective[0] != "allreduce"]
        # the reduce-scatter, as `reduce_scatter_sum` does it on CPUs
        assert small == [("allgather_base", 2 * batch * dim * 4), ("alltoall_base", batch * (dim + 1) * 4)]
        assert sum(size for name, size in seen if name == "allreduce") == parameters
        assert sum(size for _, size in small) < batch * 3 * SIDE * SIDE * 4 / 10


def test_other_exchanges_send_what_they_say():
    """`data/exchange.py`: uint8 crops once, or every rank's float32 views to all."""
    world_size = 4
    for way, name, bytes_a_value in (("all_to_all", "alltoall_base", 1), ("all_gather", "allgather_base", 4)):
        config = config_of(way)
        for seen, _ in run(collectives_of_a_step, world_size, config):
            views = config.optim.global_batch_size // (world_size if way == "all_to_all" else 1)
            assert seen[0] == (name, views * 3 * SIDE * SIDE * bytes_a_value)
            assert [kind for kind, _ in seen if kind != "allreduce"] == [name, "allgather_base", "alltoall_base"]


def test_a_world_of_one_needs_no_process_group():
    x = torch.randn(3, 2)
    for function in (all_gather, reduce_scatter_sum, all_reduce_sum, gather_uneven):
        assert function(x, World()) is x
