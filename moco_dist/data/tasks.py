"""What a rank decodes and cuts out for one batch. Every loader takes the same tasks, so all give the same views."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.config.address import Url
from moco_dist.config.loading import OnError
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import counter_rng
from moco_dist.data.batch import CropBatch
from moco_dist.data.colours import draw_colours
from moco_dist.data.crops import crop_box, crop_draws, is_flipped, smallest_side
from moco_dist.data.images import ImageError
from moco_dist.data.plan import Plan
from moco_dist.data.storage import is_gone
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError

MAX_SUCCESSORS = 100  # unreadable files in a row before giving up

T = TypeVar("T")


class Crop(NamedTuple):
    """How a view of S x S pixels is cut out of an image.

    Attributes:
        box: left, top, right, bottom in pixels, within the image.
        flip: whether it is mirrored.
        resized: (height, width) that the box is resized to, bilinear with antialiasing, as if nothing lay outside of
            it; the view is the central S x S. None: S x S itself.
        smallest: short side in pixels of the smallest crop that may be taken of an image of this size, by which a
            JPEG's decoding scale is chosen; None: this crop's own. What else is cut out of the image, and by whom,
            must not matter to a view.
    """

    box: tuple[int, int, int, int]
    flip: bool = False
    resized: tuple[int, int] | None = None
    smallest: float | None = None


@dataclass(frozen=True)
class DecodeTask(Generic[T]):
    """The images of one batch and the rows of it that they fill.

    Attributes:
        samples: (D,) int64, images to decode, each once.
        rows: for each of them the one or two rows that it gives; over all of them 0 .. R-1.
        crop: the Crop of (row, width, height).
        finish: makes the batch out of uint8 (R, 3, S, S) and the notes on files that were replaced.
        most_rows: that a task of the same kind may have; None: R of this one.
    """

    samples: NDArray[np.int64]
    rows: list[tuple[int, ...]]
    crop: Callable[[int, int, int], Crop]
    finish: Callable[[Tensor, tuple[str, ...]], T]
    most_rows: int | None = None

    @property
    def num_rows(self) -> int:
        """R, views in the batch."""
        return sum(map(len, self.rows))

    def crops(self, image: int, width: int, height: int) -> list[Crop]:
        """The crops of the task's `image`-th image, once its size is known."""
        return [self.crop(row, width, height) for row in self.rows[image]]


TaskOf = Callable[[int], DecodeTask[T]]


def view_task(step: int, config: PretrainConfig, plan: Plan, world: World) -> DecodeTask[CropBatch]:
    """This rank's share of a step of pre-training: rows 0 .. n-1 are the queries' views, the rest the keys'.

    The keys' views are those that this rank encodes, in their order, or where crops travel those of `Plan.key_route`.
    A sample whose two views are both made here is decoded once.
    """
    augment, seed = config.augment, plan.seed
    samples_q = plan.query_indices(step, world)
    samples_k = samples_coloured = plan.key_indices(step, world)
    mates = plan.mates(config.shuffle.exchange, world)
    if len(mates) > 1 and config.shuffle.exchange == "all_gather":
        samples_k = samples_coloured = samples_q
    elif len(mates) > 1:
        samples_k = plan.key_route(step, world, mates).samples
    draws = np.vstack(
        [
            crop_draws(seed, step, samples_q, counter_rng.STREAM_CROP_Q),
            crop_draws(seed, step, samples_k, counter_rng.STREAM_CROP_K),
        ]
    )
    n = len(samples_q)
    rows = {int(sample): [row] for row, sample in enumerate(samples_q)}
    for row, sample in enumerate(samples_k):
        rows.setdefault(int(sample), []).append(n + row)

    def crop(row: int, width: int, height: int) -> Crop:
        box = crop_box(draws[row], width, height, augment.crop_scale)
        smallest = smallest_side(width, height, augment.crop_scale)
        return Crop(box, is_flipped(draws[row], augment.flip_probability), smallest=smallest)

    def finish(views: Tensor, replaced: tuple[str, ...]) -> CropBatch:
        return CropBatch(
            view_q=views[:n],
            view_k=views[n:],
            samples_q=torch.from_numpy(samples_q),
            samples_k=torch.from_numpy(samples_k),
            colours_q=draw_colours(augment, seed, step, samples_q, counter_rng.STREAM_COLOUR_Q),
            colours_k=draw_colours(augment, seed, step, samples_coloured, counter_rng.STREAM_COLOUR_K),
            key_order=torch.from_numpy(plan.key_permutation(step)),
            replaced=replaced,
        )

    return DecodeTask(np.array(list(rows)), [tuple(r) for r in rows.values()], crop, finish, most_rows=3 * n)


def row_task(samples: NDArray[np.int64], crop: Callable[[int, int, int], Crop]) -> DecodeTask[Tensor]:
    """One view of each of `samples`, in this order."""
    return DecodeTask(samples, [(row,) for row in range(len(samples))], crop, lambda views, _: views)


def with_successors(
    sample: int,
    total: int,
    root: Path | Url,
    on_error: OnError,
    attempt: Callable[[int], T],
    replaced: list[str],
) -> T:
    """`attempt(sample)`; under `skip-and-report`, of the first readable image after it, and a note in `replaced`.

    Raises:
        ImageError: `attempt`'s, or 100 images in a row cannot be read.
        InfrastructureError: `root`, which holds all the images, is gone itself.
    """
    for candidate in range(sample, sample + MAX_SUCCESSORS):
        try:
            return attempt(candidate % total)
        except ImageError as error:
            if is_gone(root):
                raise InfrastructureError(f"{root} is gone, or its storage does not answer: {error}") from error
            if on_error == "fail":
                raise
            replaced.append(str(error))
            last = error
    raise type(last)(f"{MAX_SUCCESSORS} images in a row cannot be read; the last: {last}")
