"""Ending early on a scheduler's word: any rank may be told, all stop after the same step."""

import os
import signal
import threading
import time
from typing import Any

import torch

from moco_dist.distributed.collectives import start_all_reduce_max
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_TERMINATED, LoadingError

CHECK_EVERY_STEPS = 4
SAVE, STOP, FAILED = 1, 2, 3  # of what several ranks say, the greatest holds
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # the last: its terminal was closed
SAME_SIGNAL_SECONDS = 5  # schedulers and torchrun may both forward one signal
PATIENCE_SECONDS = 20  # a rank among others waits so long for its batch after it was asked to stop


class StopRequest:
    """What ranks have to agree on between steps: whether to save now, or to save and stop, and for which reason.

    SIGTERM, SIGUSR1, SIGHUP or Ctrl-C at any rank asks for STOP; a second one, seconds later, ends that process
    at once. A rank that cannot go on for long asks for FAILED. Rank 0's clock asks for SAVE. Ranks tell each other
    every CHECK_EVERY_STEPS steps by an all-reduce of one byte on the CPU, which nobody waits for: its result is read
    at the next check, when it has long arrived.

    Attributes:
        failure: why this rank asked for FAILED.
    """

    def __init__(self, save_every_seconds: float, world: World) -> None:
        self._world, self._save_every_seconds = world, save_every_seconds
        self._saved_at = time.monotonic()
        self._asked_at = 0.0
        self.failure: LoadingError | None = None
        self._word = torch.zeros(1, dtype=torch.uint8)
        self._pending: Any = None
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {
            signum: signal.signal(signum, lambda *_: None) for signum in SIGNALS
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN  # nohup has it ignored
        }  # fmt: skip
        self._thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error: object) -> None:
        """Signals do again what they did before."""
        signal.set_wakeup_fd(self._wakeup_before)
        for signum, handler in self._before.items():
            signal.signal(signum, handler or signal.SIG_DFL)
        os.close(self._writer)  # which ends the thread
        self._thread.join(1)  # a thread that a process ends amid may abort it

    def _listen(self, reader: int) -> None:
        """The thread that hears signals: no handler of Python's runs while the main one waits in a collective."""
        while numbers := os.read(reader, 1):
            if numbers[0] in SIGNALS:
                now = time.monotonic()
                if self._asked_at and now - self._asked_at > SAME_SIGNAL_SECONDS:
                    os._exit(EXIT_TERMINATED)
                self._asked_at = self._asked_at or now
        os.close(reader)

    @property
    def is_asked(self) -> bool:
        """Whether this rank was asked to stop: for work that ranks do apart from each other."""
        return bool(self._asked_at)

    def fail(self, error: LoadingError) -> None:
        """Ask for FAILED: this rank can do the steps until all have saved, and no more."""
        self.failure = error

    def agreed(self, step: int) -> int | None:
        """SAVE, STOP, FAILED or None after `step` steps: the same on all ranks. Called by all, after every step."""
        if self._world.world_size > 1 and step % CHECK_EVERY_STEPS:
            return None
        word = self._own_word()
        if self._world.world_size > 1:
            previous = 0
            if self._pending is not None:
                self._pending.wait()
                previous = int(self._word.item())
            self._word.fill_(word)
            self._pending = start_all_reduce_max(self._word)
            word = previous
        return word or None

    def ends_waiting(self) -> bool:
        """Whether this rank may wait no longer for a batch: it was asked to stop.

        A rank that is alone stops between two steps, at once. Of several ranks the others are in the midst of the next
        step by then, and nothing can be saved without this rank's batch: it has some seconds to come.
        """
        patience = PATIENCE_SECONDS if self._world.world_size > 1 else 0
        return self._asked_at > 0 and time.monotonic() - self._asked_at >= patience

    def _own_word(self) -> int:
        if self.failure:
            return FAILED
        if self._asked_at:
            return STOP
        if self._world.is_main and time.monotonic() - self._saved_at > self._save_every_seconds:
            self._saved_at = time.monotonic()
            return SAVE
        return 0
