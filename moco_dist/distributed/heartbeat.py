"""Who is missing: every rank says through the rendezvous store that it lives, and watches the next one.

A rank whose host lost its power does not close its connections: the others would wait in a collective for its whole
timeout and then know nothing. Here each rank sets one key of the store every few seconds and reads two (its
neighbour's, and the name of a culprit that another rank has found), whatever the number of ranks.
"""

import contextlib
import itertools
import os
import secrets
import socket
import sys
import threading
import time
from types import TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d

from moco_dist.distributed.collectives import gather_texts
from moco_dist.distributed.world import World

EXIT_PEER_LOST = 69  # EX_UNAVAILABLE
BEATS_A_TIMEOUT = 6
_DONE, _ENDED = "done", "ended: "


class Heartbeat:
    """A context manager around everything that calls collectives; does nothing in a world of one.

    If another rank ends or is silent for `timeout_seconds`, this process ends, with a line that names the rank and its
    host. It ends by `os._exit`, since its threads may be stuck in collectives for ever.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self._world, self._timeout = world, timeout_seconds
        self._interval = timeout_seconds / BEATS_A_TIMEOUT
        self._quit, self._main_waits = threading.Event(), threading.Event()

    def __enter__(self) -> "Heartbeat":
        if self._world.world_size == 1:
            return self
        # torchrun may keep the store through restarts: what an earlier group of ranks left there is not for this one.
        group = gather_texts(secrets.token_hex(8), self._world)[0]
        # A connection of its own: the main thread's may be busy waiting.
        self._store = dist.PrefixStore(group, distributed_c10d._get_default_store().clone())
        self._beat("0")
        self._last_answer = time.monotonic()
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._watch_peer, self._watch_store)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.world_size == 1:
            return
        if error is not None and _is_lost_connection(error):
            self._main_waits.set()
            self._threads[0].join(self._timeout + 2 * self._interval)  # it ends the process, if it finds who is missing
            self._end(f"the connection to another rank was lost: {str(error).splitlines()[0]}")
        self._quit.set()
        self._threads[0].join(self._interval)
        reason = (str(error) or type(error).__name__).splitlines()[0] if error else ""
        with contextlib.suppress(RuntimeError):
            self._beat(_ENDED + reason if error else _DONE)

    def _beat(self, text: str) -> None:
        self._store.set(f"beat/{self._world.rank}", f"{socket.gethostname()} {text}")

    def _watch_peer(self) -> None:
        """Beat, and look at the next rank's beats and for a culprit that somebody has found."""
        watched = (self._world.rank + 1) % self._world.world_size
        last, last_change = "", time.monotonic()
        for count in itertools.count(1):
            if self._quit.wait(0.2 if self._main_waits.is_set() else self._interval):
                return
            try:
                self._beat(str(count))
                culprit, text = self._read("culprit"), self._read(f"beat/{watched}")
            except RuntimeError:  # of torch's store, whatever happened: `_watch_store` counts the seconds
                continue
            now = self._last_answer = time.monotonic()
            if text != last:
                last, last_change = text, now
            host, _, state = text.partition(" ")
            is_late = now - last_change > self._timeout and state != _DONE
            # A rank that says it ends has a reason that others may share: they have the time to end in their own way.
            if state.startswith(_ENDED) and (is_late or self._main_waits.is_set()):
                culprit = culprit or f"rank {watched} on host {host} {state}"
            elif is_late:
                culprit = culprit or f"rank {watched} on host {host} has not been heard of for {self._timeout:g} s"
            if culprit:
                with contextlib.suppress(RuntimeError):
                    self._store.set("culprit", culprit)
                self._end(culprit)

    def _watch_store(self) -> None:
        """A store whose host is gone may never answer the thread that asks."""
        while not self._quit.wait(self._interval):
            if time.monotonic() - self._last_answer > self._timeout + self._interval:
                silence = f"the rendezvous store has not answered for {self._timeout:g} s"
                self._end(f"{silence}; its host is gone, or the network is down")

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _end(self, culprit: str) -> None:
        print(f"[rank {self._world.rank}] error: {culprit}", file=sys.stderr, flush=True)
        os._exit(EXIT_PEER_LOST)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone; gloo raises a plain RuntimeError."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return type(error) is RuntimeError and ("gloo/transport" in str(error) or "Connection" in str(error))
