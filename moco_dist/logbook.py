"""What a run says while it runs: log.jsonl, the tracker, and a progress bar or plain lines for a person."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moco_dist.distributed.collectives import all_reduce_sum
from moco_dist.distributed.world import World
from moco_dist.tracking import Tracker


class Logbook:
    """Collects an interval's numbers on the device; `write` brings them to the host, once an interval.

    Only rank 0 writes. Times are wall-clock seconds of this process.
    """

    def __init__(self, run_dir: Path, tracker: Tracker, world: World, start: int, stop: int) -> None:
        self._world, self._tracker, self._stop = world, tracker, stop
        self._file = (run_dir / "log.jsonl").open("a", encoding="utf-8") if world.is_main else None
        self._bar = tqdm(
            total=stop, initial=start, unit="step", disable=not (world.is_main and sys.stderr.isatty()), leave=False
        )
        self._step, self._interval_start = start, time.perf_counter()
        self._wait_seconds = 0.0
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor, wait_seconds: float) -> None:
        """One step's loss (this rank's mean, left on the device) and how long its batch was waited for."""
        self._losses.append(loss)
        self._wait_seconds += wait_seconds
        self._bar.update()

    def first_not_finite(self) -> tuple[int, float] | None:
        """The first step (from 0) since the last `write` whose loss on any rank is not finite; and that loss.

        Called by all ranks; the same answer on all of them.
        """
        if not self._losses:
            return None
        losses = all_reduce_sum(torch.stack(self._losses), self._world).tolist()
        bad = (i for i, loss in enumerate(losses) if not math.isfinite(loss))
        return next(((self._step + i, losses[i]) for i in bad), None)

    def write(self, step: int, epoch: float, lr: float, batch_size: int, scalars: dict[str, Tensor]) -> None:
        """Close the interval at `step` (steps done so far). Called by all ranks.

        Args:
            step: optimiser steps done.
            epoch: epochs done.
            lr: the last step's learning rate.
            batch_size: global; for images per second (source images, two views each).
            scalars: () tensors, equal on all ranks; taken to the host together with the losses.
        """
        loss = all_reduce_sum(torch.stack(self._losses).mean(), self._world) / self._world.world_size
        values = torch.stack([loss, *(value.to(loss) for value in scalars.values())]).tolist()
        elapsed = time.perf_counter() - self._interval_start
        steps = step - self._step
        row = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": values[0],
            "lr": lr,
            **dict(zip(scalars, values[1:], strict=True)),
            "images_per_second": steps * batch_size / elapsed,
            "data_wait_share": self._wait_seconds / elapsed,
            "eta_seconds": elapsed / steps * (self._stop - step),
        }
        self.record(row)
        self._step, self._interval_start, self._wait_seconds = step, time.perf_counter(), 0.0
        self._losses.clear()

    def record(self, row: dict[str, Any]) -> None:
        """One line of log.jsonl, of the tracker and for a person. `row` has `step`."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._tracker.log_metrics(row["step"], {k: v for k, v in row.items() if k != "step"})
        self.say(_as_line(row, self._stop))

    def say(self, text: str) -> None:
        """A line for a person, above the progress bar where there is one."""
        if self._world.is_main:
            self._bar.write(text, file=sys.stderr if sys.stderr.isatty() else sys.stdout)
            sys.stdout.flush()

    def say_of_rank(self, text: str) -> None:
        """A line that any rank may have, with its number where there are several."""
        if self._world.is_main:
            self.say(text)
        else:
            print(f"[rank {self._world.rank}] {text}", flush=True)

    def exclude(self, seconds: float) -> None:
        """Time that is no training (an evaluation, a checkpoint): left out of images per second."""
        self._interval_start += seconds

    def close(self) -> None:
        """End the progress bar and the file."""
        self._bar.close()
        if self._file is not None:
            self._file.close()


def _as_line(row: dict[str, Any], stop: int) -> str:
    parts = [f"step {row['step']}/{stop}"]
    if "loss" in row:
        minutes, seconds = divmod(round(row["eta_seconds"]), 60)
        parts += [
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.4g}",
            f"top-1 {row['contrastive_top1']:.1f} %",
            f"std {row['embedding_std']:.2f}",
            f"{row['images_per_second']:.0f} images/s",
            f"data wait {100 * row['data_wait_share']:.0f} %",
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left",
        ]
    parts += [f"kNN {row['knn_top1']:.2f} %"] if "knn_top1" in row else []
    return "  ".join(parts)


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """log.jsonl as one row a step, in order; empty where there is none.

    A resumed run logs some steps twice (the last counts); a line that was cut short when the run was stopped is left
    out.
    """
    path, rows = run_dir / "log.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]
