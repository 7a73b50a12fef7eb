"""How far long work is: a bar where somebody watches, else a line on stderr at least every minute."""

import contextlib
import sys
import threading
import time
from datetime import timedelta

from tqdm import tqdm

from moco_dist.distributed.world import World

TELL_SECONDS = 30


class Told:
    """Work that is told of on rank 0 for the length of a `with`; `add` counts.

    A thread writes the lines, so that one step which takes minutes is told of too.
    """

    def __init__(self, what: str, total: int | None, unit: str, world: World, done: int = 0) -> None:
        """Begin.

        Args:
            what: what the work is, as a line begins.
            total: how much there is; None: nobody knows yet.
            unit: what is counted, in the plural.
            world: this process.
            done: how much an earlier process did.
        """
        self._what, self._total, self._unit, self._first, self._done = what, total, unit, done, done
        self._note = ""
        self._started = time.monotonic()
        self._ended = threading.Event()
        is_watched = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=done, desc=what, unit=f" {unit}", disable=not (world.is_main and is_watched),
            leave=False,
        )  # fmt: skip
        self._teller = threading.Thread(target=self._tell, daemon=True)
        if world.is_main and not is_watched:
            self._teller.start()

    def add(self, count: int = 1, note: str = "") -> None:
        """So much more is done; `note` says what came of it."""
        self._done += count
        self._note = note
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._teller.is_alive():
            self._teller.join()
        self._bar.close()

    def line(self) -> str:
        """How far it is, and how long the rest takes at the rate so far."""
        of = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._what}: {self._done:,}{of} {self._unit}"]
        seconds, done = time.monotonic() - self._started, self._done - self._first
        if self._note:
            parts.append(self._note)
        if done and self._total is not None:
            left = timedelta(seconds=round(seconds / done * (self._total - self._done)))
            parts.append(f"{left} left")
        else:
            parts.append(f"begun {timedelta(seconds=round(seconds))} ago")
        return "  ".join(parts)

    def _tell(self) -> None:
        while not self._ended.wait(TELL_SECONDS):
            with contextlib.suppress(OSError, ValueError):  # a line is never a condition
                print(self.line(), file=sys.stderr, flush=True)
