"""A trained backbone in a program's hand: its transform, and features of a batch or of all images of a folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

from moco_dist.config.address import Url, root_of
from moco_dist.config.evaluate import EvalConfig, EvalDataConfig
from moco_dist.config.section import path_of
from moco_dist.data.crops import centre_resize
from moco_dist.data.decode import cut, cut_pixels
from moco_dist.data.folder import read_bytes
from moco_dist.data.tasks import Crop
from moco_dist.distributed.world import World, world_from_env
from moco_dist.errors import UserError
from moco_dist.evaluate.any_images import OpenedBackbone, evaluation_of, images_of, open_backbone
from moco_dist.evaluate.features import extract


@dataclass(frozen=True)
class Features:
    """Features of images, in the order of their paths.

    Attributes:
        values: float32 (N, D), on the CPU.
        paths: N paths below the folder that was asked for.
        labels: int64 (N,), numbers into `classes`; -1 for an image that lies in no class folder.
        classes: names of the class folders.
    """

    values: Tensor
    paths: list[str]
    labels: Tensor
    classes: tuple[str, ...]


class Backbone:
    """A trained network without its head, frozen, with the evaluations' transform.

    Attributes:
        module: float (N, 3, S, S), of this mean and std, to (N, D); in evaluation mode.
        dim: D, size of a feature.
        step: optimiser steps behind it; 0 where unknown.
        identity: network, size, normalisation and a hash of the weights, as plain values.
    """

    def __init__(self, opened: OpenedBackbone, world: World) -> None:
        """See `load_backbone`."""
        self._opened, self._world = opened, world
        self.module: nn.Module = opened.encoder.module
        self.dim, self.step, self.identity = opened.encoder.dim, opened.encoder.step, opened.identity

    def transform(self, image: Image.Image | str | Path) -> Tensor:
        """The centre crop uint8 (3, S, S) of an image or an image file, as `moco-dist knn` makes it.

        Raises:
            UserError: the file cannot be read.
        """
        size = self._opened.crop

        def crops(width: int, height: int) -> list[Crop]:
            return [Crop((0, 0, width, height), resized=centre_resize(width, height, self._opened.resize, size))]

        if isinstance(image, Image.Image):
            pixels = np.array(image.convert("RGB"))
            return cut_pixels(pixels, size, crops(pixels.shape[1], pixels.shape[0]))[0]
        path = root_of(image)
        if isinstance(path, Url):
            raise UserError(
                f"{path}: images one by one are not read from an address; features() reads tar shards there"
            )
        return cut(read_bytes(path), str(image), size, crops)[0]

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (N, D) of crops uint8 (N, 3, S, S), on the backbone's device, without gradient."""
        if images.ndim != 4 or images.is_floating_point():
            raise UserError(f"{tuple(images.shape)} of {images.dtype} is no batch of crops: uint8 (N, 3, S, S) is "
                            "expected, such as torch.stack of what transform gives")  # fmt: skip
        return self._opened.encoder(images)

    def features(self, images: str | Path, batch_size: int = 256, num_workers: int | None = None) -> Features:
        """Features of all images of a folder, tar shards or a packed file, also at an address.

        `moco-dist features` has them in a file.

        Args:
            images: where they are; an address as text, since a Path makes `s3:/` of `s3://`.
            batch_size: images at once.
            num_workers: loader processes; 0 loads in this process, None takes as many as there are cores to spare.

        Raises:
            UserError: there is no image, or one cannot be read.
        """
        found = images_of(root_of(images), None, self._world)
        data = EvalDataConfig(batch_size=batch_size, num_workers=num_workers)
        evaluation = evaluation_of(self._opened, found, EvalConfig(run_dir=Path(), data=data), self._world)
        encoded = extract(evaluation, self._opened.encoder, "train", keep=False)
        return Features(encoded.values, list(found.paths), encoded.labels, found.classes)


def load_backbone(
    source: str | Path,
    arch: str = "resnet50",
    stem: str = "imagenet",
    image_size: int | None = None,
    device: str = "auto",
) -> Backbone:
    """The backbone of a run's newest checkpoint, or of a file that `moco-dist import` reads; no code in it is run.

    Args:
        source: folder of the run, or the file.
        arch: network in the file, as in `model.arch`; a run says its own.
        stem: likewise, as in `model.stem`.
        image_size: side of the centre crop in pixels; default: the run's, and 224 for a file.
        device: auto, cpu or cuda.

    Raises:
        UserError: it is neither, or does not fit the network.
    """
    world = World(device=world_from_env(device, {}).device)
    return Backbone(open_backbone(path_of(source), world, arch, stem, image_size), world)
