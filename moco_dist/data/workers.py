"""The reference loader: worker processes decode and crop; uint8 comes out.

A loader is a map from a number to a batch, this rank's whole share of a step: a function of (seed, step) alone. So any
number of workers gives the same pixels, and resuming is starting at `step`.
"""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.config.address import Url
from moco_dist.config.evaluate import EvalDataConfig
from moco_dist.config.loading import OnError, worker_count
from moco_dist.config.pretrain import DataConfig
from moco_dist.data.ahead import ahead
from moco_dist.data.decode import CropsFor, cut
from moco_dist.data.folder import read_bytes
from moco_dist.data.images import ImageFolder
from moco_dist.data.processes import made_by_processes
from moco_dist.data.shared_memory import empty
from moco_dist.data.tasks import DecodeTask, TaskOf, with_successors
from moco_dist.distributed.world import World
from moco_dist.errors import LoadingError

T = TypeVar("T")


class Source(Protocol):
    """Where images come from."""

    @property
    def root(self) -> Path | Url:
        """The folder, the file or the address that holds them all."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def announce(self, samples: NDArray[np.int64]) -> None:
        """These are read next."""

    def cut(self, sample: int, size: int, crops_for: CropsFor) -> list[Tensor]:
        """The views of one of them, as `decode.cut`."""
        ...


class Files:
    """The images of a folder."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder, self.root = folder, folder.root
        self._prefix = f"{folder.disk_root}/"  # to join by pathlib takes as long as to read

    def __len__(self) -> int:
        return len(self.folder.paths)

    def announce(self, samples: NDArray[np.int64]) -> None:
        """These are read next."""

    def cut(self, sample: int, size: int, crops_for: CropsFor) -> list[Tensor]:
        """The views of one of them, as `decode.cut`."""
        path = self._prefix + self.folder.paths[sample]
        return cut(read_bytes(path), path, size, crops_for)


class Batches(Generic[T]):
    """A map from a batch's number to the batch, for one rank.

    Args:
        source: of the images.
        task_of: number to task.
        size: side of a view in pixels.
        on_error: what to do about an image that cannot be read.
        numbers: of all batches.
        num_workers: that make them in turn, so that the next one of a worker is as many numbers on.
    """

    def __init__(
        self, source: Source, task_of: TaskOf[T], size: int, on_error: OnError, numbers: range, num_workers: int
    ) -> None:
        self.source, self.task_of, self.size = source, task_of, size
        self.on_error: OnError = on_error
        self._numbers, self._stride = numbers, max(1, num_workers)
        self._next: tuple[int, DecodeTask[T]] | None = None

    def __getitem__(self, number: int) -> T:
        task = self._task(number)
        views = empty(task.num_rows, self.size, self.size, 3).permute(0, 3, 1, 2)
        replaced: list[str] = []
        self._announce_next(number + self._stride)
        for i, sample in enumerate(task.samples):

            def attempt(candidate: int, i: int = i) -> list[Tensor]:
                return self.source.cut(candidate, self.size, lambda width, height: task.crops(i, width, height))

            cropped = with_successors(int(sample), len(self.source), self.source.root, self.on_error, attempt, replaced)
            for row, view in zip(task.rows[i], cropped, strict=True):
                views[row] = view
        return task.finish(views, tuple(replaced))

    def _task(self, number: int) -> DecodeTask[T]:
        known, self._next = self._next, None
        if known is not None and known[0] == number:
            return known[1]
        task = self.task_of(number)
        self.source.announce(task.samples)
        return task

    def _announce_next(self, number: int) -> None:
        """Have the images of a worker's next batch fetched while this one is made."""
        if number in self._numbers:
            self._next = number, self.task_of(number)
            self.source.announce(self._next[1].samples)


def batches_from_workers(
    source: Source,
    task_of: TaskOf[T],
    numbers: range,
    size: int,
    data: DataConfig | EvalDataConfig,
    world: World,
    must_end: Callable[[], bool],
    on_lost: Callable[[LoadingError], None] | None,
) -> Generator[T, None, None]:
    """The batches of `numbers`, in pinned memory where there is a GPU, from `data.num_workers` processes."""
    num_workers = worker_count(data.num_workers, world.local_world_size)
    make = Batches(source, task_of, size, data.on_error, numbers, num_workers).__getitem__
    made = made_by_processes(make, numbers, num_workers, data.prefetch_batches, must_end, on_lost)
    return made if world.device == "cpu" else ahead(_pinned(made), 1)


def _pinned(batches: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """Each batch in page-locked memory, from which a copy to the GPU waits for nothing."""
    with contextlib.closing(batches):
        for batch in batches:
            yield batch.pin_memory()
