"""Who loads what: disjoint, complete, recomputable, and the same whatever the number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_dist.data.plan import Plan
from moco_dist.distributed.world import World
from moco_dist.errors import UserError


def worlds(num_nodes, local):
    size = num_nodes * local
    return [World(rank, rank % local, size, local) for rank in range(size)]


@given(
    nodes=st.sampled_from([1, 2, 3, 8, 64]), local=st.sampled_from([1, 2, 4, 8]), per_rank=st.integers(1, 4),
    extra=st.integers(0, 40), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000), where=st.floats(0, 0.999),
)
def test_ranks_share_out_each_step(nodes, local, per_rank, extra, seed, epoch, where):
    world_size = nodes * local
    batch = world_size * per_rank
    plan = Plan(3 * batch + extra, batch, seed)
    step = epoch * plan.steps_per_epoch + int(where * plan.steps_per_epoch)
    queries = [plan.query_indices(step, world) for world in worlds(nodes, local)]
    keys = [plan.key_indices(step, world) for world in worlds(nodes, local)]
    assert all(len(part) == per_rank for part in queries + keys)
    batch_of_one = plan.query_indices(step, World())
    np.testing.assert_array_equal(np.concatenate(queries), batch_of_one)  # same order at any world size
    np.testing.assert_array_equal(np.concatenate(keys), batch_of_one[plan.key_permutation(step)])
    assert len(set(batch_of_one.tolist())) == batch  # disjoint
    assert sorted(np.concatenate(keys).tolist()) == sorted(batch_of_one.tolist())  # complete
    alone = Plan(plan.num_samples, batch, seed)  # any step, recomputed without the ones before
    np.testing.assert_array_equal(alone.global_indices(step), batch_of_one)


@given(num_samples=st.integers(1, 300), batch=st.integers(1, 64), seed=st.integers(0, 9), epoch=st.integers(0, 50))
def test_an_epoch_visits_no_sample_twice(num_samples, batch, seed, epoch):
    if num_samples < batch:
        with pytest.raises(UserError, match="less than one batch"):
            Plan(num_samples, batch, seed)
        return
    plan = Plan(num_samples, batch, seed)
    first = epoch * plan.steps_per_epoch
    visited = np.concatenate([plan.global_indices(first + i) for i in range(plan.steps_per_epoch)])
    assert len(set(visited.tolist())) == plan.steps_per_epoch * batch
    assert visited.min() >= 0
    assert visited.max() < num_samples


def test_epochs_seeds_and_shuffles_differ():
    plan = Plan(1000, 100, 0)
    assert plan.epoch(9) == 0
    assert plan.epoch(10) == 1
    assert not np.array_equal(plan.global_indices(0), plan.global_indices(10))
    assert not np.array_equal(plan.global_indices(0), Plan(1000, 100, 1).global_indices(0))
    assert not np.array_equal(plan.key_permutation(0), plan.key_permutation(1))
    # A BN group of keys mixes samples of all BN groups of queries.
    groups = plan.key_permutation(0)[:25] // 25
    assert set(groups.tolist()) == {0, 1, 2, 3}


@given(world_size=st.sampled_from([1, 2, 3, 8, 64]), per_rank=st.integers(1, 4), step=st.integers(0, 100))
def test_key_crops_travel_to_the_rank_that_encodes_them(world_size, per_rank, step):
    plan = Plan(3 * world_size * per_rank, world_size * per_rank, 0)
    everyone = worlds(1, world_size)
    routes = [plan.key_route(step, world) for world in everyone]
    sent = [plan.query_indices(step, world)[route.send_rows] for world, route in zip(everyone, routes, strict=True)]
    for world, route in zip(everyone, routes, strict=True):
        assert route.receive_counts == [other.send_counts[world.rank] for other in routes]
        before = [sum(other.send_counts[: world.rank]) for other in routes]
        received = np.concatenate(
            [samples[b : b + n] for samples, b, n in zip(sent, before, route.receive_counts, strict=True)]
        )
        keys = np.empty_like(received)
        keys[route.receive_rows] = received
        np.testing.assert_array_equal(keys, plan.key_indices(step, world))
