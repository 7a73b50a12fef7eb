"""Collectives on ranks that all hold something else, and the bytes that one step moves."""

import torch
import torch.distributed as dist

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
from moco_dist.optim import peak_learning_rate
from moco_dist.train import build, train_step
from tests.distributed.program import NUM_SAMPLES, SIDE, images, small_config
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


def bytes_of_a_step(world):
    """What each collective of one step hands to this rank, DDP's gradient buckets included."""
    config = small_config(optim={"precision": "fp32"})
    state, engine = build(config, world)
    moved = []
    gather, scatter = dist.all_gather, dist.reduce_scatter_tensor

    def counted_gather(outputs, x, *args):
        moved.append(("all_gather", (len(outputs) - 1) * x.nbytes))
        return gather(outputs, x, *args)

    def counted_scatter(out, x, *args):
        moved.append(("reduce_scatter", (world.world_size - 1) * out.nbytes))
        return scatter(out, x, *args)

    def counted_buckets(state, bucket):
        moved.append(("gradients", bucket.buffer().nbytes))
        future = dist.all_reduce(bucket.buffer().div_(world.world_size), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    dist.all_gather, dist.reduce_scatter_tensor = counted_gather, counted_scatter
    engine._ddp.register_comm_hook(None, counted_buckets)
    plan = Plan(NUM_SAMPLES, config.optim.global_batch_size, config.run.seed)
    table = images(torch.float32)
    view_q = table[torch.from_numpy(plan.query_indices(0, world)), 0]
    view_k = table[torch.from_numpy(plan.key_indices(0, world)), 1]
    order = torch.from_numpy(plan.key_permutation(0))
    train_step(state, engine, config, view_q, view_k, order, peak_learning_rate(config.optim), False, world)
    parameters = sum(p.nbytes for p in state.query_encoder.parameters())
    return moved, parameters, config


def test_no_image_crosses_the_network():
    """Two small collectives of features and the gradients: a few kB where the images would be 64 times as much."""
    world_size = 4
    for moved, parameters, config in run(bytes_of_a_step, world_size):
        per_rank, dim = config.optim.global_batch_size // world_size, config.model.embedding_dim
        by_kind = {kind: [n for k, n in moved if k == kind] for kind, _ in moved}
        assert by_kind["all_gather"] == [(world_size - 1) * per_rank * 2 * dim * 4]
        assert by_kind["reduce_scatter"] == [(world_size - 1) * per_rank * (dim + 1) * 4]
        assert sum(by_kind["gradients"]) == parameters
        assert set(by_kind) == {"all_gather", "reduce_scatter", "gradients"}
        images_would_be = (world_size - 1) * per_rank * 3 * SIDE * SIDE * 4
        assert sum(by_kind["all_gather"] + by_kind["reduce_scatter"]) < images_would_be / 20


def test_a_world_of_one_needs_no_process_group():
    x = torch.randn(3, 2)
    for function in (all_gather, reduce_scatter_sum, all_reduce_sum, gather_uneven):
        assert function(x, World()) is x
