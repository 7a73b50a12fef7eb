"""Who is missing: every rank says through the rendezvous store that it lives, watches the next one, and hears the rest.

A rank whose host lost its power does not close its connections: the others would wait in a collective for its whole
timeout and then know nothing. Here each rank sets one key of the store every few seconds and reads its neighbour's.
Whoever finds that a rank is missing, or ends by an error itself, writes that into the store as the group's last word,
for which a thread of every rank waits.
"""

import contextlib
import ctypes
import itertools
import os
import secrets
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import wait  # unlike `select`, for a process with more than 1,024 open files too
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d

from moco_dist.distributed.collectives import gather_texts
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_ABORTED, EXIT_UNREACHABLE, in_a_line

BEATS_A_TIMEOUT = 6
LISTEN_EVERY_SECONDS = 0.5
_DONE, _WORD, _HEARD = "done", "word", "heard"


class Heartbeat:
    """A context manager around everything that calls collectives; does nothing in a world of one.

    If another rank ends or is silent for `timeout_seconds`, this process ends, with a line that names the rank and its
    host. It ends by `os._exit`, since its threads may be stuck in collectives for ever. Seconds in which this process
    itself did not run (a job that Slurm suspends, a paused container) are no silence of others.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self._world, self._timeout = world, timeout_seconds
        self._interval = timeout_seconds / BEATS_A_TIMEOUT
        self._quit, self._main_waits, self._has_heard = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> "Heartbeat":
        if self._world.world_size == 1:
            return self
        # torchrun may keep the store through restarts: what an earlier group of ranks left there is not for this one.
        group, host = gather_texts(f"{secrets.token_hex(8)} {socket.gethostname()}", self._world)[0].split()
        self._is_agents_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._holder = f"torchrun at {os.environ['MASTER_ADDR']}" if self._is_agents_store else f"rank 0 on host {host}"
        # Connections of their own: the main thread's may be busy waiting.
        self._store, self._ears = (
            dist.PrefixStore(group, distributed_c10d._get_default_store().clone()) for _ in range(2)
        )
        self._line = line_to(self._store)
        self._beat("0")
        self._last_answer = time.monotonic()
        self._before_aborts = hold_aborts()
        loops = (self._listen, self._watch_peer, self._watch_store)
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.world_size == 1:
            return
        if error is not None and is_lost_connection(error):
            self._main_waits.set()
            self._threads[0].join(self._patience)  # it ends the process, if anybody finds who is missing
            self._end(f"the connection to another rank was lost: {str(error).splitlines()[0]}", tell="")
        self._quit.set()
        self._threads[0].join()
        hold_aborts(self._before_aborts)
        with contextlib.suppress(RuntimeError):
            if error is not None:
                reason = in_a_line((str(error) or type(error).__name__).splitlines()[0])
                self._tell(f"{self._own_name} ended: {reason}", self._timeout)
            elif not self._has_heard.is_set():
                self._beat(_DONE)
            self._acknowledge()
            self._wait_until_heard(self._timeout if error is None else 2 * self._interval)

    @property
    def _own_name(self) -> str:
        return f"rank {self._world.rank} on host {socket.gethostname()}"

    @property
    def _patience(self) -> float:
        """Seconds after which any rank's silence has been found."""
        return self._timeout + 2 * self._interval

    def _beat(self, text: str) -> None:
        self._store.set(f"beat/{self._world.rank}", f"{socket.gethostname()} {text}")

    def _tell(self, word: str, grace_seconds: float) -> None:
        """Make `word` the group's last, if it has none; ranks that share the reason may end by themselves."""
        if not self._has_heard.is_set():
            self._store.compare_set(_WORD, "", f"{grace_seconds} {word}")

    def _acknowledge(self) -> None:
        if not self._has_heard.is_set():
            self._has_heard.set()
            self._store.add(_HEARD, 1)

    def _wait_until_heard(self, seconds: float) -> None:
        """The store goes with its holder, which lets all others read the last word first."""
        if not self._world.is_main or self._is_agents_store:
            return
        until = time.monotonic() + seconds
        while self._store.add(_HEARD, 0) < self._world.world_size and time.monotonic() < until:
            time.sleep(0.02)

    def _listen(self) -> None:
        """Wait for the group's last word, and end with it unless this rank ends by itself before."""
        word = ""
        while not word:
            # A closed connection is seen before the store's client is used, which would print what it thinks of it.
            is_closed = bool(wait(self._line, LISTEN_EVERY_SECONDS))
            if self._quit.is_set():
                return
            if is_closed:
                self._end(f"{self._holder}, which holds the rendezvous store, has ended without a word", tell="")
            with contextlib.suppress(RuntimeError):
                word = self._read(_WORD, self._ears)
        self._acknowledge()
        seconds, _, word = word.partition(" ")
        until = time.monotonic() + float(seconds)
        while time.monotonic() < until and not self._main_waits.is_set() and not is_aborting():
            if self._quit.wait(0.1):
                return
        self._end(word, tell="")

    def _watch_peer(self) -> None:
        """Beat, and look at the next rank's beats."""
        watched = (self._world.rank + 1) % self._world.world_size
        last, silence, aborting, before = "", 0.0, 0.0, time.monotonic()
        for count in itertools.count(1):
            if self._quit.wait(self._interval) or self._has_heard.is_set():  # all have, and the store may be gone
                return
            # More than two intervals are no silence of the other rank: this process, or its connection, stood still.
            passed, before = min(time.monotonic() - before, 2 * self._interval), time.monotonic()
            aborting = aborting + passed if is_aborting() else 0.0
            if aborting > self._patience:
                word = "was aborted, as its lines say, and no other rank is missing"
                self._end(f"this rank {word}", EXIT_ABORTED, tell=f"{self._own_name} {word}")
            try:
                self._beat(str(count))
                text = self._read(f"beat/{watched}", self._store)
            except RuntimeError:  # of torch's store, whatever happened: `_watch_store` counts the seconds
                continue
            self._last_answer = time.monotonic()
            silence = silence + passed if text == last else 0.0
            last = text
            host, _, state = text.partition(" ")
            if silence > self._timeout and state != _DONE:
                self._end(f"rank {watched} on host {host} has not been heard of for {self._timeout:g} s")

    def _watch_store(self) -> None:
        """A store whose host is gone may never answer the thread that asks."""
        seen, silence, before = 0.0, 0.0, time.monotonic()
        while not (self._quit.wait(self._interval) or self._has_heard.is_set()):
            passed, before = min(time.monotonic() - before, 2 * self._interval), time.monotonic()
            silence, seen = silence + passed if self._last_answer == seen else 0.0, self._last_answer
            if silence > self._timeout + self._interval:
                what = f"{self._holder}, which holds the rendezvous store, has not answered for {self._timeout:g} s"
                self._end(f"{what}; its host is gone, or the network is down", tell="")

    def _read(self, key: str, store: dist.Store) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def _end(self, word: str, status: int = EXIT_UNREACHABLE, tell: str | None = None) -> None:
        """End this process; the first thread that comes here has the word. The others hear `tell`, or else `word`."""
        self._ending.acquire()
        with contextlib.suppress(OSError):
            print(f"[rank {self._world.rank}] error: {word}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            if tell != "":
                self._tell(tell or word, 0)
                self._acknowledge()
            self._wait_until_heard(2 * self._interval)
        os._exit(status)


def line_to(store: dist.Store) -> list[socket.socket]:
    """A connection to the store's server, to see when it ends: nothing is said on it. [] where there is no server."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return [socket.create_connection((store.host, store.port))] if isinstance(store, dist.TCPStore) else []


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone; gloo raises a plain RuntimeError."""
    text = str(error)
    if isinstance(error, dist.DistBackendError):
        return not any(own in text for own in ("ncclInvalid", "ncclUnhandledCudaError", "ncclInternalError"))
    if isinstance(error, dist.DistNetworkError):
        return True
    return type(error) is RuntimeError and ("gloo/transport" in text or "Connection" in text)


def hold_aborts(handler: int | None = None) -> int:
    """Let a thread that aborts this process stop where it is, instead of ending it. Returns the handler from before.

    NCCL's watchdog aborts when the connection to a rank breaks or a collective takes too long, and says not which rank
    it was. The threads above find that out, and then end the process with its name.

    Args:
        handler: what this has returned, to undo it.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    pause = ctypes.cast(libc.pause, ctypes.c_void_p).value
    before = libc.signal(signal.SIGABRT, pause if handler is None else handler)
    return before or 0  # ctypes says None for a null pointer, which is SIG_DFL


os.register_at_fork(after_in_child=lambda: hold_aborts(0))  # a loader's worker that aborts ends


def is_aborting() -> bool:
    """Whether a thread of this process is in the handler of SIGABRT: the kernel blocks a signal while it is handled.

    Memory allocators and other libraries have threads that block all signals for good; these are not in the handler.
    """
    for status in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):
            line = next(line for line in status.read_text().splitlines() if line.startswith("SigBlk"))
            blocked = int(line.split()[1], 16)
            if blocked >> (signal.SIGABRT - 1) & 1 and not blocked >> (signal.SIGSEGV - 1) & 1:
                return True
    return False
