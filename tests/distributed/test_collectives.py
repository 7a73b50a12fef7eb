"""Collectives on ranks that all hold something else, and the bytes that one step moves."""

import contextlib
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from moco_dist.distributed import collectives
from moco_dist.distributed.collectives import (
    all_gather,
    all_reduce_sum,
    as_sharded,
    gather_uneven,
    process_group,
    reduce_scatter_sum,
    shard_bounds,
)
from moco_dist.distributed.world import World
from moco_dist.method.build import build_method
from moco_dist.run import checkpoint
from tests.distributed.program import SIDE, small_config
from tests.distributed.traffic import collectives_of_a_step
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


def config_of(way, optimizer="sgd"):
    return small_config(optim={"precision": "fp32", "optimizer": optimizer, "grad_accum_steps": 1},
                        shuffle={"exchange": way})  # fmt: skip


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
    """`data/key_views.py`: uint8 crops once, or every rank's float32 views to all."""
    world_size = 4
    ways = [("auto", "alltoall_base", 1), ("all_to_all", "alltoall_base", 1), ("all_gather", "allgather_base", 4)]
    for way, name, bytes_a_value in ways:
        config = config_of(way)
        for seen, _ in run(collectives_of_a_step, world_size, config):
            views = config.optim.global_batch_size // (1 if way == "all_gather" else world_size)
            assert seen[0] == (name, views * 3 * SIDE * SIDE * bytes_a_value)
            assert [kind for kind, _ in seen if kind != "allreduce"] == [name, "allgather_base", "alltoall_base"]


def test_a_world_of_one_needs_no_process_group():
    x = torch.randn(3, 2)
    for function in (all_gather, reduce_scatter_sum, all_reduce_sum, gather_uneven):
        assert function(x, World()) is x


def groups_made(world):
    """Process groups that two sharded tensors make, on a machine that has a GPU and a run that does not use it."""
    torch.cuda.is_available = lambda: True
    before = len(distributed_c10d._world.pg_map)
    for _ in range(2):
        as_sharded(torch.zeros(2, 3), 2 * world.world_size, world)
    return len(distributed_c10d._world.pg_map) - before


def test_a_sharded_tensor_makes_no_group():
    """Each would be a connection to every other rank, at every checkpoint."""
    assert run(groups_made, 2) == [0, 0]


def test_the_mesh_of_checkpoints_is_made_once_a_group_and_ends_with_it(monkeypatch):
    """By rank 3 of a fake group of 64, and then of one of 8."""
    from_group, init, meshes = DeviceMesh.from_group, dist.init_process_group, []

    def made(*args, **settings):
        meshes.append(from_group(*args, **settings))
        return meshes[-1]

    monkeypatch.setattr(DeviceMesh, "from_group", made)
    monkeypatch.setattr(collectives, "meet", lambda *_: FakeStore())
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: init("fake", **settings))
    for num_ranks in (64, 8):
        world = World(3, 3, num_ranks, 8)
        with process_group(world):
            of_size = {"moco": {"queue_size": 1024}, "optim": {"global_batch_size": 8 * num_ranks}}
            method = build_method(small_config(**of_size), world)
            for _ in range(2):
                checkpoint.snapshot(method, {}, world)
        assert [mesh.size() for mesh in meshes] == [num_ranks]
        meshes.clear()
    assert collectives._mesh_of.cache_info().currsize == 0


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_group_that_has_ended_leaves_how_exceptions_are_printed(error):
    """Torch puts `[rank0]:` before each line of an exception that nobody catches, and does not undo it."""
    before = sys.excepthook
    with contextlib.suppress(ValueError), process_group(World(), alone_too=True):
        assert sys.excepthook is not before
        if error:
            raise error
    assert sys.excepthook is before
