"""What programs and notebooks may import, as `moco_dist.NAME`. Everything else may change from version to version.

This module is imported when one of its names is first asked for, so that `import moco_dist` alone takes no torch.
"""

import contextlib
import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from moco_dist.cli.ranks import ranks
from moco_dist.config.evaluate import EvalConfig, EvalDataConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.section import path_of
from moco_dist.config.source import read_config
from moco_dist.data.crops import centre_resize
from moco_dist.data.decode import cut, cut_pixels
from moco_dist.data.folder import read_bytes
from moco_dist.data.tasks import Crop
from moco_dist.distributed.stop import SIGNALS
from moco_dist.distributed.world import World, world_from_env
from moco_dist.errors import UserError
from moco_dist.evaluate.any_images import OpenedBackbone, evaluation_of, images_of, open_backbone
from moco_dist.evaluate.features import extract
from moco_dist.run import logbook, results
from moco_dist.run.folder import RunFolder
from moco_dist.tracking import Tracker
from moco_dist.train import pretrain as train

__all__ = [
    "Backbone", "Features", "PretrainConfig", "UserError", "load_backbone", "pretrain", "pretrain_config", "read_log",
    "read_results",
]  # fmt: skip


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
        return cut(read_bytes(path_of(image)), str(image), size, crops)[0]

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (N, D) of crops uint8 (N, 3, S, S), on the backbone's device, without gradient."""
        if images.ndim != 4 or images.is_floating_point():
            raise UserError(f"{tuple(images.shape)} of {images.dtype} is no batch of crops: uint8 (N, 3, S, S) is "
                            "expected, such as torch.stack of what transform gives")  # fmt: skip
        return self._opened.encoder(images)

    def features(self, images: str | Path, batch_size: int = 256, num_workers: int | None = None) -> Features:
        """Features of all images of a folder, tar shards or a packed file; `moco-dist features` has them in a file.

        Args:
            images: where they are.
            batch_size: images at once.
            num_workers: loader processes; 0 loads in this process, None takes as many as there are cores to spare.

        Raises:
            UserError: there is no image, or one cannot be read.
        """
        found = images_of(path_of(images), None, self._world)
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


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """The log of a run, a row a step in order: `step`, `loss`, `lr`, and `knn_top1` where it was measured.

    Raises:
        UserError: it is not the folder of a run.
    """
    RunFolder(path_of(run_dir)).require()
    return logbook.read_log(path_of(run_dir))


def read_results(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """What evaluations of a run came to, by names such as `knn_trained`: `accuracy` in percent, `step`, `num_val`.

    Raises:
        UserError: it is not the folder of a run, or a file is damaged.
    """
    return results.read_results(path_of(run_dir))


def pretrain_config(*configs: str | Path, **settings: Any) -> PretrainConfig:
    """The settings of a pre-training.

    Args:
        configs: files, or names of packaged configs; later ones go over earlier ones.
        settings: over all of these, by section: `run={"dir": "runs/mine"}, optim={"epochs": 100}`.

    Raises:
        UserError: a line for each mistake.
    """
    paths = [Path(config) for config in configs]
    return read_config(PretrainConfig, paths[0] if paths else None, list(_flags(settings)), paths[1:])


def _flags(settings: dict[str, Any], section: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{section}{name}.")
        else:
            yield f"--{section}{name}={value if isinstance(value, str | Path) else json.dumps(value)}"


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train as `moco-dist pretrain` does, from the newest checkpoint of `run.dir` if there is one.

    In a program that torchrun starts, each process calls it. It takes Ctrl-C and SIGTERM as requests to save and stop,
    and so has to be called in the main thread.

    Returns:
        the folder of the last checkpoint.

    Raises:
        UserError: a mistake, in a line.
        Preempted: it was asked to stop, and has saved; the same call goes on.
    """
    with _signals_as_before(), ranks(config) as world, Tracker.for_pretraining(config, world) as tracker:
        return train(config, world, tracker)


@contextlib.contextmanager
def _signals_as_before() -> Iterator[None]:
    """After a training, which ends a command, a notebook goes on."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
