"""The reference loader: PIL decodes, crops and flips in worker processes; uint8 comes out.

A loader is a map from step to batch: an item of the torch data set below is this rank's whole share of a step, a
function of (seed, step) alone. So any number of workers gives the same pixels, and resuming is starting at `step`.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moco_dist.config import EvalDataConfig, PretrainConfig
from moco_dist.data import counter_rng
from moco_dist.data.augment import draw_colours
from moco_dist.data.batch import CropBatch
from moco_dist.data.crops import centre_box, crop_box, crop_draws, is_flipped
from moco_dist.data.datasets import ImageError, ImageFolder, read_image
from moco_dist.data.plan import Plan
from moco_dist.distributed.world import World

MAX_SUCCESSORS = 100  # unreadable files in a row before giving up


def pretrain_batches(
    folder: ImageFolder, config: PretrainConfig, plan: Plan, world: World, start: int, stop: int
) -> Iterator[CropBatch]:
    """This rank's CropBatch of steps start .. stop-1, in pinned memory where there is a GPU."""
    steps = ViewSteps(folder, config, plan, world)
    return iter(_loader(steps, range(start, stop), config.data.num_workers, world))


def eval_batches(
    folder: ImageFolder, indices: NDArray[np.int64], data: EvalDataConfig, resize: int, crop: int, world: World
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
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
    crops = functools.partial(_centre_crop, resize=resize, crop=crop)
    for views, i in zip(_loader(Crops(folder, batches, crops), range(len(batches)), data.num_workers, world),
                        range(len(batches)), strict=True):
        yield views, batches[i]


class ViewSteps(Dataset[CropBatch]):
    """Step to CropBatch, for one rank."""

    def __init__(self, folder: ImageFolder, config: PretrainConfig, plan: Plan, world: World) -> None:
        self.folder, self.plan, self.world = folder, plan, world
        self.data, self.augment, self.exchange = config.data, config.augment, config.shuffle.exchange

    def __getitem__(self, step: int) -> CropBatch:
        samples_q = self.plan.query_indices(step, self.world)
        samples_encoded = self.plan.key_indices(step, self.world)
        samples_k = samples_encoded if self.exchange == "loader" else samples_q
        samples_coloured = samples_q if self.exchange == "all_gather" else samples_encoded
        seed, size = self.plan.seed, self.data.image_size
        draws_q = crop_draws(seed, step, samples_q, counter_rng.STREAM_CROP_Q)
        draws_k = crop_draws(seed, step, samples_k, counter_rng.STREAM_CROP_K)
        view_q = np.empty((len(samples_q), size, size, 3), dtype=np.uint8)
        view_k = np.empty_like(view_q)
        row_in_k = {int(sample): row for row, sample in enumerate(samples_k)}
        replaced: list[str] = []
        # A sample whose two views are both this rank's (all of them in a world of one) is decoded once.
        for row, sample in enumerate(samples_q):
            image = self._read(int(sample), replaced)
            view_q[row] = self._crop(image, draws_q[row])
            row_k = row_in_k.pop(int(sample), None)
            if row_k is not None:
                view_k[row_k] = self._crop(image, draws_k[row_k])
        for sample, row in row_in_k.items():
            view_k[row] = self._crop(self._read(sample, replaced), draws_k[row])
        return CropBatch(
            view_q=_channels_first(view_q),
            view_k=_channels_first(view_k),
            samples_q=torch.from_numpy(samples_q),
            samples_k=torch.from_numpy(samples_k),
            colours_q=draw_colours(self.augment, seed, step, samples_q, counter_rng.STREAM_COLOUR_Q),
            colours_k=draw_colours(self.augment, seed, step, samples_coloured, counter_rng.STREAM_COLOUR_K),
            replaced=tuple(replaced),
        )

    def _crop(self, image: Image.Image, draws: NDArray[np.float64]) -> NDArray[np.uint8]:
        box = crop_box(draws, image.width, image.height, self.augment.crop_scale)
        return _resized(image.crop(box), self.data.image_size, is_flipped(draws, self.augment.flip_probability))

    def _read(self, sample: int, replaced: list[str]) -> Image.Image:
        """The image of `sample`; under `skip-and-report`, of the first readable one after it."""
        for candidate in range(sample, sample + MAX_SUCCESSORS):
            try:
                return read_image(self.folder.root / self.folder.paths[candidate % len(self.folder.paths)])
            except ImageError as error:
                if self.data.on_error == "fail":
                    raise
                replaced.append(str(error))
        raise ImageError(f"{MAX_SUCCESSORS} images in a row cannot be read; the last: {replaced[-1]}")


class Crops(Dataset[Tensor]):
    """Batch number to uint8 crops, by a function of (image, sample)."""

    def __init__(self, folder: ImageFolder, batches: list[NDArray[np.int64]], crop) -> None:
        self.folder, self.batches, self.crop = folder, batches, crop

    def __getitem__(self, number: int) -> Tensor:
        paths = self.folder.paths
        crops = [self.crop(read_image(self.folder.root / paths[i]), int(i)) for i in self.batches[number]]
        return _channels_first(np.stack(crops))


def _centre_crop(image: Image.Image, sample: int, resize: int, crop: int) -> NDArray[np.uint8]:
    box = centre_box(image.width, image.height, resize, crop)
    return np.asarray(image.resize((crop, crop), Image.Resampling.BILINEAR, box=box))


def _resized(image: Image.Image, size: int, flip: bool) -> NDArray[np.uint8]:
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if flip else pixels


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """(N, S, S, 3) in memory, seen as (N, 3, S, S): channels-last, without a copy."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _loader(dataset: Dataset, order: range, num_workers: int, world: World) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        pin_memory=world.device != "cpu",
        prefetch_factor=2 if num_workers else None,
    )
