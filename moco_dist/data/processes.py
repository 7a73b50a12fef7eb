"""Items made by worker processes, in order. Whoever waits for one of them learns why none comes.

A worker hands an item over by a socket to its rank alone; large tensors in it lie in memory that the two share. It
makes, pickles and sends in one thread, so whatever goes wrong there is an exception that the rank raises. A worker that
is killed is started again: an item is a function of its number. So a rank can also make the items itself, where other
ranks cannot do without: slowly, but with no more memory and files than one of them needs.
"""

import contextlib
import errno
import importlib
import io
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from moco_dist.data.shared_memory import Blocks, Memory, Unpickler
from moco_dist.errors import LoadingError, UserError

T = TypeVar("T")

POLL_SECONDS = 1.0
TELL_EVERY_SECONDS, GIVE_UP_SECONDS = 60, 1800  # of waiting for one item
MOST_DEATHS = 3  # of workers at one item
CLOSE_SECONDS = 10
STATES = {"D": "it waits for storage", "T": "it is stopped", "R": "it computes", "Z": "it has ended"}


class LostWorkersError(LoadingError):
    """Workers are killed again and again, or cannot hand over what they make."""


def made_by_processes(
    make: Callable[[int], T],
    numbers: Sequence[int],
    num_workers: int,
    depth: int,
    must_end: Callable[[], bool] = lambda: False,
    on_lost: Callable[[LoadingError], None] | None = None,
) -> Generator[T, None, None]:
    """`make(number)` of each number, in their order, made ahead of time; the workers end with the generator.

    Args:
        make: called in a worker; in this process where there are no workers.
        numbers: of the items. Worker w makes every `num_workers`-th, from the w-th on.
        num_workers: processes; 0: none.
        depth: items that each of them may be ahead.
        must_end: looked at while an item is waited for; true: nobody may wait any longer.
        on_lost: called once where workers are killed again and again, or cannot hand an item over; all that are left
            are then made in this process. None: that is an error.

    Raises:
        LoadingError: workers are lost and nobody goes on without them, no item has come for half an hour, or `must_end`
            said so.
        Exception: of `make`, as it was.
    """
    if not num_workers:
        for number in numbers:
            yield make(number)
        return
    workers = [_Worker(make, numbers[w::num_workers], depth) for w in range(min(num_workers, len(numbers)))]
    try:
        for worker in workers:
            worker.start()
        for i in range(len(numbers)):
            try:
                item = workers[i % len(workers)].take(must_end)
            except LostWorkersError as error:
                if on_lost is None:
                    raise
                _tell(f"{error}; this process makes what is still needed itself")
                on_lost(error)
                break
            yield item
        else:
            return
    finally:
        for worker in workers:
            worker.end()
    for number in numbers[i:]:
        yield make(number)


class _Worker:
    """A process, as its rank sees it."""

    def __init__(self, make: Callable[[int], Any], numbers: Sequence[int], depth: int) -> None:
        self._make, self._depth = make, depth
        self._left, self._promised = iter(numbers), deque[int]()  # not yet asked for; asked for, not yet here
        self._deaths = 0  # since the last item

    def start(self) -> None:
        """Start a process, and ask for what was promised and for more."""
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self._memory = Memory()
        self._process = context.Process(target=_work, args=(self._make, there, os.getpid()), daemon=True, name="loader")
        self._process.start()
        there.close()
        for number in self._promised:
            self._send(number)
        while len(self._promised) < self._depth and self._ask():
            pass

    def take(self, must_end: Callable[[], bool]) -> Any:
        """The next item."""
        while True:
            self._wait(must_end)
            try:
                error, text, blocks = self._here.recv()
                tensors = [self._memory.tensor(block, self._here) for block in blocks]
                break
            except (EOFError, ConnectionError):
                self._start_again()
            except (OSError, RuntimeError) as problem:  # recv_handle's own for a descriptor that had no room
                number = getattr(problem, "errno", None) or errno.EMFILE
                raise _cannot_hand_over(OSError(number, os.strerror(number))) from problem
        if error:
            raise pickle.loads(text)
        self._deaths = 0
        self._promised.popleft()
        self._ask()
        return Unpickler(io.BytesIO(text), tensors).load()

    def end(self) -> None:
        """End the process at once, whatever it does: it holds nothing but memory."""
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.join(CLOSE_SECONDS)  # one that waits for a dead file server ends when that comes back
            self._here.close()

    def _ask(self) -> bool:
        """Ask for one more item; false if there is none."""
        for number in self._left:
            self._promised.append(number)
            self._send(number)
            return True
        return False

    def _send(self, number: int) -> None:
        with contextlib.suppress(ConnectionError):  # a dead one is started again when it is waited for
            self._here.send((number, self._memory.dropped()))

    def _wait(self, must_end: Callable[[], bool]) -> None:
        """Wait until there is something to read, or the process is gone.

        Seconds are counted, not taken from a clock, which would include those in which this process itself was stopped.
        """
        for seconds in itertools.count():
            if connection.wait([self._here, self._process.sentinel], POLL_SECONDS):
                return
            waited = f"no batch has come for {seconds + 1} s from loader worker {self._process.pid} ({self._state()})"
            if must_end():
                raise LoadingError(f"asked to stop while {waited}")
            if seconds + 1 >= GIVE_UP_SECONDS:
                raise LoadingError(waited)
            if (seconds + 1) % TELL_EVERY_SECONDS == 0:
                _tell(waited)

    def _state(self) -> str:
        try:
            state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            state = ""
        return STATES.get(state, "it waits")

    def _start_again(self) -> None:
        self._process.join(CLOSE_SECONDS)
        code = self._process.exitcode
        how = f"exit status {code}" if code is None or code >= 0 else signal.Signals(-code).name
        if code == -signal.SIGKILL:
            how += ", as when memory is used up: fewer data.num_workers or data.prefetch_batches need less"
        text = f"loader worker {self._process.pid} was killed ({how})"
        self._deaths += 1
        self.end()
        if self._deaths == MOST_DEATHS:
            raise LostWorkersError(f"{text}, the {MOST_DEATHS}rd at this batch")
        _tell(f"{text}; another one makes its batches")
        self.start()


def _work(make: Callable[[int], Any], rank: connection.Connection, parent: int) -> None:
    """The process of a worker: it makes the items whose numbers it is sent.

    Slurm, torchrun and terminals signal a rank's whole process group, and the rank's last steps still need their items:
    a worker ends when its rank kills it, or is gone.
    """
    _forget_unfinished_imports()
    signal.set_wakeup_fd(-1)  # this one is the rank's, which hears of its own signals by it
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    blocks = Blocks.current = Blocks()
    while os.getppid() == parent:
        if not rank.poll(POLL_SECONDS):
            continue
        try:
            number, dropped = rank.recv()
            blocks.begin(dropped)
            try:
                text = blocks.pickled(make(number))
            except BaseException as error:
                _send_error(rank, _cannot_hand_over(error) if isinstance(error, OSError) else error)
            else:
                rank.send((False, text, [block.facts() for block in blocks.used]))
                for block in blocks.used:
                    block.hand_over(rank, parent)
        except (EOFError, ConnectionError):
            return  # the rank is gone


def _forget_unfinished_imports() -> None:
    """Let this process begin anew the imports that the rank's other threads were in the midst of when it was forked.

    Those threads, which draw pictures or speak to MLflow, are not in this process: it would wait for ever for a module
    (PIL has one for each format) that one of them had begun to import.
    """
    locks = importlib._bootstrap._module_locks  # type: ignore[attr-defined]
    for name, reference in list(locks.items()):
        lock = reference()
        if lock is None or lock.owner == threading.get_ident():
            continue
        del locks[name]
        if getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False):
            del sys.modules[name]


def _send_error(rank: connection.Connection, error: BaseException) -> None:
    if not isinstance(error, UserError):
        error.add_note("in a loader's worker:\n" + traceback.format_exc())
    try:
        text = pickle.dumps(error)
        pickle.loads(text)
    except Exception:
        text = pickle.dumps(RuntimeError(f"in a loader's worker:\n{traceback.format_exc()}"))
    rank.send((True, text, []))


def _cannot_hand_over(error: OSError) -> LostWorkersError:
    reason = (error.strerror or str(error)).lower()
    hint = {
        errno.EMFILE: "; ulimit -n 4096 allows more", errno.ENFILE: "; the host's limit is fs.file-max",
        errno.ENOMEM: "; fewer data.num_workers or data.prefetch_batches need less",
    }.get(error.errno or 0, "")  # fmt: skip
    where = f" ({error.filename})" if error.filename else ""
    return LostWorkersError(f"a loader's worker cannot make or hand over a batch: {reason}{where}{hint}")


def _tell(text: str) -> None:
    print(f"[rank {os.environ.get('RANK', '0')}] warning: {text}", file=sys.stderr, flush=True)
