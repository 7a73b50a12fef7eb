"""Batches of training with labels: which images, in which order, and their random crops; functions of (seed, epoch)."""

import functools
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.data import counter_rng
from moco_dist.data.crops import crop_box, crop_draws, is_flipped
from moco_dist.data.loaders import load
from moco_dist.data.tasks import Crop, DecodeTask, row_task
from moco_dist.evaluate.subject import Evaluation

FLIP_PROBABILITY = 0.5


def global_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The epoch's batches over all ranks: a permutation, cut into whole batches; at least one.

    The samples past the last whole batch are left out of this epoch; the next one permutes all of them anew.
    """
    order = np.random.default_rng([4, seed, epoch]).permutation(num_samples)
    batch_size = min(batch_size, num_samples)
    return [order[i : i + batch_size] for i in range(0, num_samples - batch_size + 1, batch_size)]


def batches_in_epoch(num_samples: int, batch_size: int) -> int:
    """How many `global_batches` there are."""
    return num_samples // min(batch_size, num_samples)


def crop_batches(
    evaluation: Evaluation, own: list[NDArray[np.int64]], scale: tuple[float, float], seed: int, epoch: int
) -> Generator[Tensor, None, None]:
    """Random resized crops and flips of this rank's training images, uint8 (n, 3, S, S) for each batch of `own`."""
    task_of = functools.partial(random_crops, own=own, scale=scale, seed=seed, epoch=epoch)
    train, data = evaluation.train, evaluation.config.data
    return load(train, task_of, range(len(own)), evaluation.crop, data, evaluation.world)


def random_crops(
    number: int, *, own: list[NDArray[np.int64]], scale: tuple[float, float], seed: int, epoch: int
) -> DecodeTask[Tensor]:
    """Random resized crops of a batch, mirrored half of the time; each a function of (seed, epoch, sample)."""
    draws = crop_draws(seed, epoch, own[number], counter_rng.STREAM_LINEAR)

    def crop(row: int, width: int, height: int) -> Crop:
        return Crop(crop_box(draws[row], width, height, scale), is_flipped(draws[row], FLIP_PROBABILITY))

    return row_task(own[number], crop)
