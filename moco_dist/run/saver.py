"""Checkpoints while training goes on: a step waits for the copy to host memory, a thread does the rest."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moco_dist.distributed.collectives import cpu_group, gather_texts
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.run import checkpoint
from moco_dist.run.checkpoint import Snapshot, TrainState


class Saver:
    """Writes checkpoints of one run, one at a time. All ranks call the same methods at the same steps.

    A checkpoint that cannot be written (a full disk) is told and hurts nothing: training goes on, the older ones
    stay, and the next interval tries again.

    Attributes:
        stall_seconds: what the last `save` kept the training waiting.
    """

    def __init__(
        self, run_dir: Path, keep_last: int, keep_every_steps: int, world: World, say: Callable[[str], None]
    ) -> None:
        self._run_dir, self._world, self._say = run_dir, world, say
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._group = cpu_group(world)
        self._thread: threading.Thread | None = None
        self._problem = ""
        self.stall_seconds = 0.0

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Take a snapshot and begin to write it; first waits for the one before, if that is still being written."""
        started = time.perf_counter()
        self._join()
        taken = checkpoint.snapshot(state, facts, self._world)
        self._thread = threading.Thread(target=self._write, args=(taken,), name="checkpoint", daemon=True)
        self._thread.start()
        self.stall_seconds = time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the last checkpoint, on all ranks.

        Raises:
            UserError: it could not be written.
        """
        self._join()
        problem = next((text for text in gather_texts(self._problem, self._world) if text), "")  # and all have ended
        if problem:
            raise UserError(f"the last checkpoint was not written: {problem}")

    def _write(self, taken: Snapshot) -> None:
        self._problem = ""
        try:
            checkpoint.write(taken, self._run_dir, self._world, self._group)
            if self._world.is_main:
                checkpoint.prune(self._run_dir, self._keep_last, self._keep_every_steps)
        except checkpoint.CANNOT_WRITE as error:
            self._problem = checkpoint.reason(error)
            self._say(f"warning: no checkpoint at step {taken.step}: {self._problem}; training goes on, and the next "
                      "interval tries again")  # fmt: skip

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
