"""The reference loader: worker processes decode and crop; uint8 comes out.

A loader is a map from a number to a batch: an item of the torch data set below is this rank's whole share of a step, a
function of (seed, step) alone. So any number of workers gives the same pixels, and resuming is starting at `step`.
"""

import signal
import warnings
from collections.abc import Generator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moco_dist.config.evaluate import EvalDataConfig
from moco_dist.config.loading import OnError, worker_count
from moco_dist.config.pretrain import DataConfig
from moco_dist.data.decode import CropsFor, cut
from moco_dist.data.folder import read_bytes
from moco_dist.data.images import ImageFolder
from moco_dist.data.jobs import JobOf, with_successors
from moco_dist.distributed.world import World
from moco_dist.errors import UserError

# More workers than cores is the user's choice; `moco-dist doctor` speaks of it.
warnings.filterwarnings("ignore", "This DataLoader will create", module="torch")

T = TypeVar("T")


class Source(Protocol):
    """Where images come from."""

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
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder.paths)

    def announce(self, samples: NDArray[np.int64]) -> None:
        """These are read next."""

    def cut(self, sample: int, size: int, crops_for: CropsFor) -> list[Tensor]:
        """The views of one of them, as `decode.cut`."""
        path = self.folder.root / self.folder.paths[sample]
        return cut(read_bytes(path), str(path), size, crops_for)


class Batches(Dataset[T], Generic[T]):
    """Number to batch, for one rank."""

    def __init__(self, source: Source, job_of: JobOf[T], size: int, on_error: OnError) -> None:
        self.source, self.job_of, self.size = source, job_of, size
        self.on_error: OnError = on_error

    def __getitem__(self, number: int) -> T:
        job = self.job_of(number)
        views = torch.empty(job.num_rows, 3, self.size, self.size, dtype=torch.uint8)
        replaced: list[str] = []
        self.source.announce(job.samples)
        for i, sample in enumerate(job.samples):

            def attempt(candidate: int, i: int = i) -> list[Tensor]:
                return self.source.cut(candidate, self.size, lambda width, height: job.crops(i, width, height))

            cropped = with_successors(int(sample), len(self.source), self.on_error, attempt, replaced)
            for row, view in zip(job.rows[i], cropped, strict=True):
                views[row] = view
        return job.finish(views, tuple(replaced))


def batches_from_workers(
    source: Source, job_of: JobOf[T], numbers: range, size: int, data: DataConfig | EvalDataConfig, world: World
) -> Generator[T, None, None]:
    """The batches of `numbers`, in pinned memory where there is a GPU, from `data.num_workers` processes."""
    num_workers = worker_count(data.num_workers, world.local_world_size)
    return batches_of(
        DataLoader(
            Batches(source, job_of, size, data.on_error),
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            pin_memory=world.device != "cpu",
            prefetch_factor=data.prefetch_batches if num_workers else None,
            worker_init_fn=leave_signals_to_the_rank,
        )
    )


def batches_of(loader: DataLoader) -> Generator[Any, None, None]:
    """A loader's batches; its workers end with them, or when the generator is closed.

    Raises:
        UserError: a worker's, as it was: torch puts the worker's traceback before its text.
    """
    batches = iter(loader)
    try:
        yield from batches
    except UserError as error:
        text = str(error).rstrip().rpartition(f".{type(error).__name__}: ")[2]
        raise type(error)(text) from error
    finally:
        # After an error the traceback holds the iterator, and when both are collected together its queues go first:
        # workers never hear that they may end, and torch waits many seconds for each of them.
        getattr(batches, "_shutdown_workers", lambda: None)()


def leave_signals_to_the_rank(worker: int) -> None:
    """Slurm and torchrun signal a rank's whole process group; its last steps still need their batches.

    A worker ends when its rank closes the loader, or is gone.
    """
    signal.set_wakeup_fd(-1)  # the rank's, through which it hears of its own
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
