"""What one rank finds out for the others: a listed folder, an index that was read, what a checkpoint holds.

A file server that each of 512 ranks asks for 1.28 million names answers none of them for minutes.
"""

import itertools
import time
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moco_dist.distributed.collectives import broadcast_value, gather_texts
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_IO, SaidElsewhere, UserError

T = TypeVar("T")

FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.01, 1.0  # all ranks look into one store, perhaps for minutes
HEARD_SECONDS = 5.0  # within which all ranks have seen why there will be nothing
SAID_SECONDS = 2.0  # within which the rank with the error has said it: a launcher ends all when the first one ends
_MADE, _PROBLEM, _HEARD = "made", "problem", "heard"
_calls = itertools.count()


def once_a_host(make: Callable[[], T], about: str, world: World) -> T:
    """`make()` of one rank of each host, which tells the other ranks of its host. Called by all ranks.

    Rank 0 is first, and the other hosts follow when it is done: they find what it leaves on a shared disk (an index).
    Ranks wait as long as it takes, longer than any collective may; the heartbeat sees whether a rank is lost.

    Args:
        make: returns plain values, which are pickled between ranks of one host.
        about: what is asked for; ranks of a host that ask for something else have a rank of their own for it.
        world: this process.

    Raises:
        UserError, OSError: of this rank's `make`.
        SaidElsewhere: of another rank's, which says it.
    """
    if world.world_size == 1:
        return make()
    asked = gather_texts(f"{world.rank - world.local_rank} {about}", world)
    makers = [asked.index(text) for text in asked]
    maker = makers[world.rank]
    # No group of ranks for it: that is a connection a pair, and its collectives end after a time-out.
    store = dist.PrefixStore(f"once_a_host/{next(_calls)}", distributed_c10d._get_default_store())
    result = None
    if world.rank == maker:
        if not world.is_main:
            _wait_until_made(store, 1)
        try:
            result = make()
        except (UserError, OSError) as error:
            status = error.exit_status if isinstance(error, UserError) else EXIT_IO
            store.set(_PROBLEM, f"{status} {error}")
            until = time.monotonic() + HEARD_SECONDS  # the store may go with this process
            while store.add(_HEARD, 0) < world.world_size - 1 and time.monotonic() < until:
                time.sleep(FIRST_LOOK_SECONDS)
            raise
        store.add(_MADE, 1)
    _wait_until_made(store, len(set(makers)))
    told, cpu = [result], torch.device("cpu")
    if world.rank != maker:
        dist.recv_object_list(told, maker, device=cpu)
    for rank, its in enumerate(makers):
        if its == maker == world.rank != rank:
            dist.send_object_list(told, rank, device=cpu)
    return cast(T, told[0])


def from_rank_0(make: Callable[[], T], world: World) -> T:
    """`make()` of rank 0, which tells all others. Called by all ranks; for what is done within a few seconds.

    Raises:
        UserError: of rank 0's `make`, on all ranks.
    """
    told: T | UserError | None = None
    if world.is_main:
        try:
            told = make()
        except UserError as error:
            told = error
    told = broadcast_value(told, world)
    if isinstance(told, UserError):
        raise told
    return cast(T, told)


def _wait_until_made(store: dist.Store, count: int) -> None:
    """Until so many ranks have made theirs.

    Raises:
        SaidElsewhere: one cannot.
    """
    pause = FIRST_LOOK_SECONDS
    while not store.check([_PROBLEM]):
        if store.add(_MADE, 0) >= count:
            return
        time.sleep(pause)
        pause = min(2 * pause, LAST_LOOK_SECONDS)
    store.add(_HEARD, 1)
    time.sleep(SAID_SECONDS)
    status, _, text = store.get(_PROBLEM).decode().partition(" ")
    raise SaidElsewhere(text, int(status))
