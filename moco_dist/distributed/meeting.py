"""Where ranks find each other's addresses, when they start and when they start again."""

import contextlib
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moco_dist.distributed.world import World

LOOK_EVERY_SECONDS = 0.05


def meet(world: World, timeout: timedelta) -> dist.Store:
    """A store that holds nothing but what this start of the ranks writes. Called by all ranks of a world of several.

    torchrun may keep its store when it starts ranks again, and with it the addresses of those that died. How often it
    has (TORCHELASTIC_RESTART_COUNT) differs from host to host: each counts the failures of its own ranks alone. So
    every rank comes under a name that nobody had before, and rank 0 answers each with the name of the start.

    Raises:
        TimeoutError: not all have come in time.
    """
    store, _, _ = next(rendezvous("env://", world.rank, world.world_size, timeout=timeout))
    until, own_name = time.monotonic() + timeout.total_seconds(), secrets.token_hex(8)
    if world.is_main:
        _answer_all(store, own_name, world, until)
        return dist.PrefixStore(own_name, store)
    store.set(f"came/{world.rank}", own_name)
    answer = f"start_of/{own_name}"
    while not store.check([answer]):
        _wait(until, "rank 0 has not come")
    start = store.get(answer).decode()
    store.set(f"{start}/heard/{world.rank}", "")
    return dist.PrefixStore(start, store)


def _answer_all(store: dist.Store, start: str, world: World, until: float) -> None:
    """Rank 0: tell the others the start's name until each has heard it; those of earlier starts never will."""
    missing = set(range(1, world.world_size))
    while missing:
        for rank in missing:
            if store.check([f"came/{rank}"]):
                store.set(f"start_of/{store.get(f'came/{rank}').decode()}", start)
        missing = {rank for rank in missing if not store.check([f"{start}/heard/{rank}"])}
        if missing:
            _wait(until, f"rank {', '.join(map(str, sorted(missing)))} has not come")


def _wait(until: float, problem: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(problem)
    time.sleep(LOOK_EVERY_SECONDS)


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Within it SIGTERM and Ctrl-C end this process at once, with nothing run after.

    While torch waits for other ranks no handler of Python's runs, and they may never come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
