"""Ranks that start again find each other, and nothing of those that were there before them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from moco_dist.distributed.meeting import meet
from moco_dist.distributed.world import World


@pytest.fixture
def store(monkeypatch):
    """A store as an agent of torchrun keeps it over several starts of its ranks."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return server


def start(world_size, seconds=20.0, only=None, before_rank_0=lambda: None):
    """The stores that the ranks get, each a thread here; or of `only` these ranks."""

    def one(rank):
        if rank == 0:
            before_rank_0()
        return meet(World(rank, rank, world_size, world_size), timedelta(seconds=seconds))

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, only or range(world_size)))


def test_a_start_sees_nothing_of_those_before_it(store):
    for count, world_size in enumerate((2, 3, 2)):
        store.set(f"came/{world_size - 1}", f"killed before anybody answered {count}")
        stores = start(world_size)
        assert not any(one.check(["address/0"]) for one in stores)
        stores[0].set("address/0", str(count))
        assert all(one.get("address/0") == str(count).encode() for one in stores)


def test_a_rank_that_is_replaced_while_rank_0_waits_is_answered(store):
    came = threading.Event()

    def first_one_is_killed():
        store.set("came/1", "of a rank that was killed")
        came.set()

    with ThreadPoolExecutor(2) as pool:
        rank_0 = pool.submit(start, 2, only=[0], before_rank_0=first_one_is_killed)
        assert came.wait(10)
        store.wait(["start_of/of a rank that was killed"], timedelta(seconds=10))
        (other,) = start(2, only=[1])
        rank_0.result()[0].set("address/0", "here")
    assert other.get("address/0") == b"here"


def test_who_has_not_come_is_named(store):
    with pytest.raises(TimeoutError, match="^rank 0 has not come$"):
        start(2, seconds=0.2, only=[1])
    with pytest.raises(TimeoutError, match="^rank 1, 2 has not come$"):
        start(3, seconds=0.2, only=[0])
