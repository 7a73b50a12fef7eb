"""Batches by whichever loader the config names: `data.loader`. All of them give the same views."""

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.config.address import Url
from moco_dist.config.evaluate import EvalDataConfig
from moco_dist.config.pretrain import DataConfig, PretrainConfig
from moco_dist.data.batch import CropBatch
from moco_dist.data.beton import PACKED_SUFFIX
from moco_dist.data.crops import centre_resize
from moco_dist.data.images import ImageFolder
from moco_dist.data.packed import PackedFile
from moco_dist.data.plan import Plan
from moco_dist.data.remote.cache import opened_cache
from moco_dist.data.remote.source import RemoteImages
from moco_dist.data.remote.store import is_used_here
from moco_dist.data.tar.source import TarShards
from moco_dist.data.tasks import Crop, DecodeTask, TaskOf, row_task, view_task
from moco_dist.data.workers import Files, Source, batches_from_workers
from moco_dist.distributed.world import World
from moco_dist.errors import LoadingError, UserError

T = TypeVar("T")


def never() -> bool:
    """No wait has to end."""
    return False


def pretrain_batches(
    folder: ImageFolder,
    config: PretrainConfig,
    plan: Plan,
    world: World,
    start: int,
    stop: int,
    must_end: Callable[[], bool] = never,
    on_lost: Callable[[LoadingError], None] | None = None,
) -> Generator[CropBatch, None, None]:
    """This rank's CropBatch of steps start .. stop-1, in pinned memory or on the GPU where there is one.

    `must_end` and `on_lost`: as in `load`.
    """
    task_of = functools.partial(view_task, config=config, plan=plan, world=world)
    return load(folder, task_of, range(start, stop), config.data.image_size, config.data, world, must_end, on_lost)


def eval_batches(
    folder: ImageFolder, indices: NDArray[np.int64], data: EvalDataConfig, resize: int, crop: int, world: World
) -> Generator[tuple[Tensor, NDArray[np.int64]], None, None]:
    """Centre crops, `data.batch_size` at a time, the last batch smaller.

    Args:
        folder: the images.
        indices: (N,) which of them, in this order.
        data: batch size and workers.
        resize: short side before the crop, in pixels.
        crop: S, side of the crop, in pixels.
        world: this process.

    Yields:
        uint8 (n, 3, S, S) and the n indices.
    """
    batches = [indices[i : i + data.batch_size] for i in range(0, len(indices), data.batch_size)]
    task_of = functools.partial(_centre_task, batches=batches, resize=resize, size=crop)
    with contextlib.closing(load(folder, task_of, range(len(batches)), crop, data, world)) as views_of_batches:
        yield from zip(views_of_batches, batches, strict=True)


def load(
    folder: ImageFolder,
    task_of: TaskOf[T],
    numbers: range,
    size: int,
    data: DataConfig | EvalDataConfig,
    world: World,
    must_end: Callable[[], bool] = never,
    on_lost: Callable[[LoadingError], None] | None = None,
) -> Generator[T, None, None]:
    """The batches of `numbers`, one after the other, some of them ahead of time.

    Close it, by `contextlib.closing`: processes, threads and DALI's pipeline end then, whatever still refers to it.

    Args:
        folder: the images, in files, in tar shards or packed.
        task_of: number to task.
        numbers: which batches.
        size: S, side of a view in pixels.
        data: the loader, its workers, what to do about files that cannot be read.
        world: this process.
        must_end: looked at while a batch is waited for; true ends the wait by a LoadingError.
        on_lost: called where workers cannot make the batches, which this process then does; None: a LoadingError.

    Raises:
        UserError: the loader is not installed, or does not read this kind of data; while batches are taken, an
            ImageError names a file that cannot be read, and an InfrastructureError a folder that is gone.
    """
    if is_packed(folder) and data.loader != "ffcv":
        raise UserError(f"{folder.root.parent} is a packed file, which data.loader ffcv reads, not {data.loader}")
    if data.loader == "ffcv" and not is_packed(folder):
        what = "a folder" if folder.places is None else "one of tar shards, which torchvision reads"
        raise UserError(
            f"data.loader ffcv reads a packed file, and {folder.root} is {what}; "
            "moco-dist data pack FOLDER FILE.beton makes one"
        )
    if data.loader == "dali":
        if folder.places is not None:
            raise UserError(
                f"data.loader dali reads files, and {folder.root} has tar shards, which torchvision reads; "
                "or moco-dist data pack FOLDER FILE.beton makes a file for ffcv"
            )
        from moco_dist.data.dali import batches_from_dali

        return batches_from_dali(folder, task_of, numbers, size, data, world, must_end)
    if isinstance(folder.root, Url) and is_used_here():
        data = data.model_copy(update={"num_workers": 0})  # a child of this process could not use obstore
    source = _source_of(folder, data)
    return batches_from_workers(source, task_of, numbers, size, data, world, must_end, on_lost)


def is_packed(folder: ImageFolder) -> bool:
    """Whether the images lie in a packed file, which has the training and the validation images like folders in it."""
    return (folder.places is None or isinstance(folder.root, Url)) and folder.root.parent.suffix == PACKED_SUFFIX


def _source_of(folder: ImageFolder, data: DataConfig | EvalDataConfig) -> Source:
    if isinstance(folder.root, Url):
        assert folder.places is not None
        cache = data.cache_dir and opened_cache(data.cache_dir, data.cache_bytes, folder.root, folder.places)
        return RemoteImages(folder, cache)
    if is_packed(folder):
        return PackedFile(folder)
    return Files(folder) if folder.places is None else TarShards(folder)


def _centre_task(number: int, batches: list[NDArray[np.int64]], resize: int, size: int) -> DecodeTask[Tensor]:
    def crop(row: int, width: int, height: int) -> Crop:
        return Crop((0, 0, width, height), resized=centre_resize(width, height, resize, size))

    return row_task(batches[number], crop)
