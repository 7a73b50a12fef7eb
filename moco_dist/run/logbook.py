"""What a run says while it runs: log.jsonl, the tracker, and a progress bar or plain lines for a person."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.collectives import all_reduce_sum
from moco_dist.distributed.world import World
from moco_dist.errors import in_a_line
from moco_dist.files import LineFile, read_record
from moco_dist.run.folder import RunFolder


class Logbook:
    """Collects an interval's numbers on the device; `write` brings them to the host, once an interval.

    Only rank 0 writes. All times are wall-clock seconds of this process.
    """

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        start: int,
        stop: int,
        pending_losses: Sequence[float] = (),
        also_to: Callable[[int, dict[str, Any]], object] | None = None,
    ) -> None:
        """Go on with the log of a run.

        Args:
            config: of the run; rows of log.jsonl after `start`, which an earlier process wrote before it died, are cut
                off.
            world: this process.
            start: steps done so far.
            stop: the last step.
            pending_losses: `pending_losses` of the checkpoint that the run goes on from.
            also_to: is called with the step and the other numbers of every row, as a tracker takes them.
        """
        self._config, self._world, self._stop = config, world, stop
        self._also_to = also_to
        self._file = LineFile(RunFolder(config.run.dir).log) if world.is_main else None
        if self._file is not None:
            self._file.truncate(_end_of_step(self._file.path, start))
        self._bar = tqdm(
            total=stop, initial=start, unit="step", disable=not (world.is_main and sys.stderr.isatty()), leave=False
        )
        self._step, self._timed_from, self._interval_start = start - len(pending_losses), start, time.perf_counter()
        self._wait_seconds = 0.0
        self._problem = ""
        self._on_device: list[Tensor] = []
        self._losses = list(pending_losses)

    def is_due(self, step: int) -> bool:
        """Whether the step that makes `step` of them closes an interval; the last one does."""
        return step % self._config.log.every_steps == 0 or step == self._stop

    def add(self, loss: Tensor, wait_seconds: float, replaced: Sequence[str] = ()) -> None:
        """One step.

        Args:
            loss: () this rank's mean, left on the device.
            wait_seconds: how long its batch was waited for.
            replaced: files of this rank that could not be read.
        """
        self._on_device.append(loss)
        self._wait_seconds += wait_seconds
        self._bar.update()
        for file in replaced:
            self.say_of_rank(f"replaced by its successor: {in_a_line(file)}")

    def pending_losses(self) -> list[float]:
        """Losses since the last `write`, means over ranks, equal on all of them. Called by all ranks.

        A checkpoint keeps them, so that the first interval after a resume is that of the run that was not stopped.
        """
        if self._on_device:
            losses = all_reduce_sum(torch.stack(self._on_device), self._world) / self._world.world_size
            self._losses += losses.tolist()
            self._on_device.clear()
        return list(self._losses)

    def first_not_finite(self) -> tuple[int, float] | None:
        """The first step (from 0) since the last `write` whose loss on any rank is not finite; and that loss.

        Called by all ranks; the same answer on all of them. The log gets a line of it, for `moco-dist doctor`.
        """
        bad = ((i, loss) for i, loss in enumerate(self.pending_losses()) if not math.isfinite(loss))
        found = next(((self._step + i, loss) for i, loss in bad), None)
        if found and self._file is not None:
            self._file.append(json.dumps({"step": found[0] + 1, "not_finite": str(found[1])}))
        return found

    def write(self, step: int, epoch: float, lr: float, scalars: dict[str, Tensor]) -> None:
        """Close the interval at `step` (steps done so far). Called by all ranks.

        Args:
            step: optimiser steps done.
            epoch: epochs done.
            lr: the last step's learning rate.
            scalars: () tensors, equal on all ranks; taken to the host together.
        """
        batch_size = self._config.optim.global_batch_size  # of source images, two views each
        losses = self.pending_losses()
        values = torch.stack([value.double() for value in scalars.values()]).tolist() if scalars else []
        elapsed = time.perf_counter() - self._interval_start
        steps = step - self._timed_from
        row = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": math.fsum(losses) / len(losses),
            "lr": lr,
            **dict(zip(scalars, values, strict=True)),
            "images_per_second": steps * batch_size / elapsed,
            "data_wait_share": self._wait_seconds / elapsed,
            "eta_seconds": elapsed / steps * (self._stop - step),
            "memory_bytes": memory_bytes(self._world.device),
        }
        self.record(row)
        self._step = self._timed_from = step
        self._interval_start, self._wait_seconds = time.perf_counter(), 0.0
        self._losses.clear()

    def record(self, row: dict[str, Any]) -> None:
        """One line of log.jsonl, of the tracker and for a person. `row` has `step`."""
        if self._file is None:
            return
        problem = self._file.append(json.dumps(row))
        if problem and not self._problem:
            self.say(f"warning: {self._file.path} cannot be written: {problem}; going on, and trying again")
        self._problem = problem
        if self._also_to is not None:
            self._also_to(row["step"], {k: v for k, v in row.items() if k != "step"})
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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in a `with` (an evaluation, a checkpoint) is no training: left out of images per second."""
        started = time.perf_counter()
        yield
        self._interval_start += time.perf_counter() - started

    def close(self) -> None:
        """End the progress bar and the file."""
        self._bar.close()
        if self._file is not None:
            self._file.close()


def memory_bytes(device: str) -> int:
    """The most that tensors have taken on the GPU since the last call; without a GPU, what this process takes."""
    if torch.device(device).type == "cpu":
        return psutil.Process().memory_info().rss
    peak = torch.cuda.max_memory_allocated()
    if torch.cuda.is_initialized():  # not so where a step is tried on a GPU that is not there
        torch.cuda.reset_peak_memory_stats()
    return peak


def _end_of_step(log: Path, step: int) -> int:
    """Where in log.jsonl the rows up to `step` end, since rows are in order. Damaged lines between them stay."""
    end = position = 0
    with log.open("rb") as file:
        for line in file:
            position += len(line)
            if (row := _row(line)) is None:
                continue
            if row["step"] > step:
                break
            end = position
    return end


def _row(line: bytes) -> dict[str, Any] | None:
    row = read_record(line)
    if row is None or type(row.get("step")) is not int:
        return None
    return row if all(type(value) in (int, float) or key == "not_finite" for key, value in row.items()) else None


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
    names = {"knn_top1": "kNN", "probe_top1": "linear probe"}
    parts += [f"{name} {row[key]:.2f} %" for key, name in names.items() if key in row]
    parts += [f"RankMe {row['rankme']:.1f}"] if "rankme" in row else []
    return "  ".join(parts)


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """log.jsonl as one row a step, in order; empty where there is none.

    A resumed run logs some steps twice (the last counts); a line that was cut short or damaged is left out.
    """
    path, rows = RunFolder(run_dir).log, {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        if (row := _row(line)) is not None:
            rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]
