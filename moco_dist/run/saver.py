"""Checkpoints while training goes on: a step waits for the copy to host memory, a thread does the rest."""

import threading
from collections.abc import Callable
from typing import Any

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.collectives import cpu_group, gather_texts
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError
from moco_dist.method.step import Method
from moco_dist.run import checkpoint
from moco_dist.run.checkpoint import Snapshot


class Saver:
    """Writes checkpoints of one run, one at a time. All ranks call the same methods at the same steps.

    A checkpoint that cannot be written (a full disk) is told and hurts nothing: training goes on, the older
    checkpoints stay, and the next interval tries again.
    """

    def __init__(
        self,
        config: PretrainConfig,
        facts: dict[str, Any],
        steps_per_epoch: int,
        stop: int,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        """For the run of `config`, which ends at step `stop`.

        Args:
            config: of the run.
            facts: `manifest.facts_of`.
            steps_per_epoch: whole batches in the data set.
            stop: the last step.
            world: this process.
            say: tells what could not be written.
        """
        self._config, self._stop, self._world, self._say = config, stop, world, say
        self._facts = facts
        self._keep_every_steps = config.checkpoint.keep_every_epochs * steps_per_epoch
        self._group = cpu_group(world)
        self._thread: threading.Thread | None = None
        self._problem = ""

    def is_due(self, step: int, asked: int | None) -> bool:
        """Whether to save after `step` steps: because it is time, the end, or asked for."""
        return step % self._config.checkpoint.every_steps == 0 or step == self._stop or asked is not None

    def save(self, method: Method, pending_losses: list[float]) -> None:
        """Take a snapshot and begin to write it; first waits for the one before, if that is still being written."""
        self._join()
        taken = checkpoint.snapshot(method, {**self._facts, "pending_losses": pending_losses}, self._world)
        self._thread = threading.Thread(target=self._write, args=(taken,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last checkpoint, on all ranks.

        Raises:
            InfrastructureError: it could not be written.
        """
        self._join()
        problem = next((text for text in gather_texts(self._problem, self._world) if text), "")  # and all have ended
        if problem:
            raise InfrastructureError(f"the last checkpoint was not written: {problem}")

    def _write(self, taken: Snapshot) -> None:
        self._problem = ""
        try:
            checkpoint.write(taken, self._config.run.dir, self._world, self._group)
            if self._world.is_main:
                checkpoint.prune(self._config.run.dir, self._config.checkpoint.keep_last, self._keep_every_steps)
        except checkpoint.CANNOT_WRITE as error:
            self._problem = checkpoint.reason(error)
            self._say(f"warning: no checkpoint at step {taken.step}: {self._problem}; training goes on, and the next "
                      "interval tries again")  # fmt: skip

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
