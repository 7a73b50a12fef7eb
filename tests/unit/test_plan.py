"""Who loads what: disjoint, complete, recomputable, and the same whatever the number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_dist.config.pretrain import PretrainConfig, block_sizes, default_block, shuffle_block
from moco_dist.data.plan import Plan, plan_of
from moco_dist.data.tasks import view_task
from moco_dist.data.traffic import key_traffic
from moco_dist.distributed.world import World
from moco_dist.errors import UserError


def worlds(num_nodes, local):
    size = num_nodes * local
    return [World(rank, rank % local, size, local) for rank in range(size)]


@given(
    nodes=st.sampled_from([1, 2, 3, 8, 64]),
    local=st.sampled_from([1, 2, 4, 8]),
    per_rank=st.integers(1, 4),
    extra=st.integers(0, 40),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 1000),
    where=st.floats(0, 0.999),
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


@st.composite
def layouts(draw):
    """(hosts, ranks of each, samples of a rank, block size that divides the batch)."""
    nodes, local = draw(st.sampled_from([1, 2, 3, 8])), draw(st.sampled_from([1, 2, 3, 8]))
    per_rank = draw(st.integers(1, 12))
    batch = nodes * local * per_rank
    return nodes, local, per_rank, draw(st.sampled_from([size for size in range(1, batch + 1) if batch % size == 0]))


@given(layout=layouts(), exchange=st.sampled_from(["auto", "loader", "all_to_all"]), step=st.integers(0, 100))
def test_key_crops_come_to_the_rank_that_encodes_them(layout, exchange, step):
    nodes, local, per_rank, block = layout
    batch = nodes * local * per_rank
    plan = Plan(3 * batch, batch, 0, block)
    everyone = worlds(nodes, local)
    mates = [plan.mates(exchange, world) for world in everyone]
    assert all(mates[mate] == mates[rank] for rank in range(len(everyone)) for mate in mates[rank])  # so they agree
    routes = [plan.key_route(step, world, of) for world, of in zip(everyone, mates, strict=True)]
    for world, of, route in zip(everyone, mates, routes, strict=True):
        place = world.rank - of.start
        assert route.receive_counts == [routes[mate].send_counts[place] for mate in of]
        before = [sum(routes[mate].send_counts[:place]) for mate in of]
        received = [
            routes[mate].samples[b : b + n] for mate, b, n in zip(of, before, route.receive_counts, strict=True)
        ]
        gathered = np.concatenate([*received, route.samples[sum(route.send_counts) :]])
        np.testing.assert_array_equal(gathered[route.gathered_rows], plan.key_indices(step, world))
        hosts = {mate // local for mate in of}
        assert exchange == "all_to_all" or len(hosts) == 1


@given(layout=layouts(), step=st.integers(0, 100))
def test_keys_stay_in_their_block_and_on_the_ranks_that_hold_it(layout, step):
    nodes, local, per_rank, block = layout
    batch = nodes * local * per_rank
    plan = Plan(batch, batch, 0, block)
    order = plan.key_permutation(step)
    assert sorted(order.tolist()) == list(range(batch))
    np.testing.assert_array_equal(order // block, np.arange(batch) // block)
    for world in worlds(nodes, local):
        ranks = plan.block_ranks(world)
        owners = order[world.rank * per_rank : (world.rank + 1) * per_rank] // per_rank
        assert ranks.start <= owners.min() and owners.max() < ranks.stop
        assert (len(ranks) == 1) == (per_rank % block == 0)


def test_a_block_is_permuted_as_a_whole_batch_was():
    """One block is the permutation that runs were made with before there were blocks, digit for digit."""
    expected = [int(i) for i in np.random.default_rng([1, 7, 31]).permutation(256)]
    assert Plan(600, 256, 7).key_permutation(31).tolist() == expected
    assert Plan(600, 256, 7, 256).key_permutation(31).tolist() == expected
    assert Plan(600, 512, 7, 256).key_permutation(31)[:256].tolist() == expected
    assert Plan(600, 512, 7, 256).key_permutation(31)[256:].tolist() != [256 + i for i in expected]
    assert expected[:4] == [130, 201, 238, 223]


@pytest.mark.parametrize(("batch", "block", "group"), [(256, 256, 32), (1024, 256, 32), (128, 64, 32), (96, 24, 8)])
def test_a_sample_s_key_is_in_its_query_s_bn_group_no_more_often_than_chance(batch, block, group):
    """Chance is group / block: a key is put on any place of its block."""
    plan, steps = Plan(batch, batch, 3, block), 1000
    together = np.array([
        (plan.key_permutation(step) // group == np.arange(batch) // group).mean() for step in range(steps)
    ])  # fmt: skip
    chance = group / block
    assert abs(together.mean() - chance) < 5 * together.std() / steps**0.5
    assert 5 * together.std() / steps**0.5 < chance / 8


@pytest.mark.parametrize(
    ("batch", "group", "expected"),
    [(256, 32, 256), (128, 32, 128), (4096, 32, 256), (384, 32, 192), (512, 256, 512), (1024, 256, 512), (32, 32, 32),
     (8192, 128, 256), (288, 96, 288)],
)  # fmt: skip
def test_the_default_block_fits_every_batch(batch, group, expected):
    assert default_block(batch, group) == expected
    assert expected in block_sizes(batch, group)


def config_of(exchange, batch=256, block=None):
    return PretrainConfig.model_validate({
        "run": {"dir": "r"}, "data": {"root": "d"}, "optim": {"global_batch_size": batch},
        "model": {"bn_group_size": 8}, "moco": {"queue_size": 8192},
        "shuffle": {"exchange": exchange, "block_size": block},
    })  # fmt: skip


@pytest.mark.parametrize("exchange", ["auto", "loader", "all_to_all"])
@pytest.mark.parametrize(
    ("nodes", "local", "batch", "block"),
    [(1, 1, 256, None), (1, 8, 256, None), (2, 4, 256, None), (2, 4, 256, 64), (2, 3, 384, 128), (4, 2, 256, 128)],
)
def test_decodes_and_bytes_are_those_of_the_jobs(exchange, nodes, local, batch, block):
    """The arithmetic of `key_traffic` against what ranks are told to decode and to receive."""
    config = config_of(exchange, batch, block)
    plan, steps = plan_of(config, batch), 60
    decodes, received, crossing = [], [], []
    for step in range(steps):
        for world in worlds(nodes, local):
            decodes.append(len(view_task(step, config, plan, world).samples))
            mates = plan.mates(exchange, world)
            counts = dict(zip(mates, plan.key_route(step, world, mates).receive_counts, strict=True))
            received.append(sum(n for mate, n in counts.items() if mate != world.rank))
            crossing.append(sum(n for mate, n in counts.items() if mate // local != world.rank // local))
    per_rank, crop = batch // (nodes * local), 3 * 224**2
    traffic = key_traffic(config, per_rank, nodes * local, local)
    assert np.mean(decodes) == pytest.approx(per_rank * traffic.decodes, rel=0.02)
    assert np.mean(received) == pytest.approx(traffic.received_bytes / crop, rel=0.04)
    assert local * np.mean(crossing) == pytest.approx(traffic.into_host_bytes / crop, rel=0.04)
    if exchange == "auto" and traffic.spans_hosts:
        assert "of several hosts" in traffic.text() and traffic.decodes > 1 and not any(crossing)


def test_the_block_size_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"shuffle.block_size 100 has to be two or more BN groups of 8 .*: 16, 32, 64"):
        config_of("auto", 256, 100)
    with pytest.raises(ValueError, match="shuffle.block_size 8 has to be two or more"):
        config_of("auto", 256, 8)
    assert shuffle_block(config_of("auto", 256, 16)) == 16
    assert shuffle_block(config_of("auto", 1024)) == 256
