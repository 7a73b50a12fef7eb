"""What an evaluation is about: the run, labelled images, and the frozen encoder of the run or of a baseline."""

import contextlib
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist.config.address import Url
from moco_dist.config.evaluate import EvalConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.images import NO_CLASS, ImageFolder, rows_of, share_of_classes, subset
from moco_dist.data.loaders import eval_batches
from moco_dist.data.sources import find_images
from moco_dist.distributed.collectives import all_gather
from moco_dist.distributed.once import once_a_host
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.engine.precision import autocast, compute_dtype, slow_on_cpu
from moco_dist.errors import InfrastructureError, UserError
from moco_dist.files import write_whole
from moco_dist.method.batch_norm import GroupedBatchNorm2d, running_statistics
from moco_dist.method.encoder import build_encoder
from moco_dist.run import checkpoint
from moco_dist.run.folder import RunFolder
from moco_dist.run.known_data import has_evaluated_on, has_trained_on, missed_if_gone, remember
from moco_dist.run.weights import load_trained

CALIBRATION_SAMPLES = 512  # training images that give the untrained network its BatchNorm statistics
MAX_PIXEL_SIDE = 32


@dataclass(frozen=True)
class Evaluation:
    """One evaluation's settings, resolved.

    Attributes:
        config: settings of the evaluation.
        pretrain: settings of the run.
        train, val: images with classes.
        resize, crop: short side before the centre crop, and the crop's side, in pixels.
        dtype: what the encoder computes in.
        world: this process.
    """

    config: EvalConfig
    pretrain: PretrainConfig
    train: ImageFolder
    val: ImageFolder
    resize: int
    crop: int
    dtype: torch.dtype
    world: World


@dataclass(frozen=True)
class FrozenEncoder:
    """uint8 images to float32 features, without gradient.

    Attributes:
        name: trained, untrained or pixels.
        step: optimiser steps behind it.
        module: normalised images to features.
        dim: D, size of a feature.
        pretrain: settings of the run, for the pixels' mean and std.
        dtype: what it computes in.
        device: where.
    """

    name: str
    step: int
    module: nn.Module
    dim: int
    pretrain: PretrainConfig
    dtype: torch.dtype
    device: str

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        """uint8 (N, 3, S, S) to float32 (N, D) on the device."""
        with autocast(self.dtype, self.device):
            return self.module(self.normalised(views)).float()

    def normalised(self, views: Tensor) -> Tensor:
        """uint8 (N, 3, S, S) to what `module` takes, on the device."""
        mean, std = self._mean_and_std
        return views.to(self.device, non_blocking=True).to(mean.dtype).div_(255).sub_(mean).div_(std)

    @functools.cached_property
    def _mean_and_std(self) -> Tensor:
        """(2, 3, 1, 1). It is made once: each time, a GPU would be waited for."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        augment = self.pretrain.augment
        return torch.tensor([augment.mean, augment.std], dtype=dtype, device=self.device)[..., None, None]


class Pixels(nn.Module):
    """The image itself as features: flattened, averaged down to at most 32 x 32 pixels, divided by sqrt(D).

    The average keeps features of large crops at a size that can be stored; the division keeps a feature's squared
    length near 1 whatever D, so that one learning rate serves. It changes no cosine.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, D)."""
        if images.shape[-1] > MAX_PIXEL_SIDE:
            images = F.adaptive_avg_pool2d(images, MAX_PIXEL_SIDE)
        return images.flatten(1) / math.sqrt(images[0].numel())


def open_evaluation(config: EvalConfig, world: World) -> Evaluation:
    """The run's settings and the images to evaluate on.

    Raises:
        UserError: there is no run, no validation set, or images without a class.
    """
    pretrain = RunFolder(config.run_dir).settings("run_dir")
    data = config.data.model_copy(update={"loader": config.data.loader or pretrain.data.loader})
    if data.cache_dir is None:
        of_run = {name: getattr(pretrain.data, name) for name in ("cache_dir", "cache_bytes")}
        data = data.model_copy(update=of_run)
    config = config.model_copy(update={"data": data})
    root = data.root or pretrain.data.root
    train, val = labelled_images(root, data.max_train_samples, data.max_val_samples, config.run_dir, world)
    if data.label_fraction < 1:
        train = rows_of(train, np.flatnonzero(share_of_classes(train.labels, data.label_fraction, [6])))
    layers = len(pretrain.model.head_hidden_dims) + 1
    if config.transfer.keep_head_layers > layers:
        raise UserError(
            f"transfer.keep_head_layers {config.transfer.keep_head_layers}: the head of {config.run_dir} has {layers} "
            f"layer(s); 0 to {layers} can be kept"
        )
    crop = data.image_size or pretrain.data.image_size
    dtype = compute_dtype(config.precision, world.device)
    if world.is_main and (slow := slow_on_cpu(dtype, world.device)):
        print(slow, file=sys.stderr)
    return Evaluation(config, pretrain, train, val, data.resize or round(crop * 8 / 7), crop, dtype, world)


def labelled_images(
    root: Path | Url, max_train: int | None, max_val: int | None, run_dir: Path, world: World
) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation images of ROOT, at most so many of each; one rank of each host looks.

    Raises:
        UserError: there is no validation set, or images without a class.
        InfrastructureError: there is none any more: the run or an earlier evaluation of it has found them there.
    """
    run = RunFolder(run_dir)
    return once_a_host(lambda: _labelled_images(root, max_train, max_val, run), f"{root} {max_train} {max_val}", world)


def _labelled_images(
    root: Path | Url, max_train: int | None, max_val: int | None, run: RunFolder
) -> tuple[ImageFolder, ImageFolder]:
    was_there = has_evaluated_on(root, run.data_roots)
    with missed_if_gone(root, was_there or has_trained_on(root, run.root), run.root):
        train = find_images(root, "train", index_folder=run.indices)
    with missed_if_gone(root, was_there, run.root):  # a pre-training alone needs no validation images
        val = find_images(root, "val", index_folder=run.indices)
    for folder in (train, val):
        without = np.flatnonzero(folder.labels == NO_CLASS)
        if len(without):
            raise UserError(
                f"{len(without)} of {len(folder.paths)} images in {folder.root} have no class "
                f"({folder.paths[without[0]]}); an evaluation needs {folder.root}/CLASS/IMAGE"
            )
    return subset(train, max_train), subset(val, max_val)


def frozen_encoder(evaluation: Evaluation, name: str) -> FrozenEncoder:
    """The encoder of one of the config's `encoders`: trained, untrained or pixels.

    `untrained` is the run's network with the weights that the seed draws, whatever `model.init` is. Its BatchNorm
    statistics are those of training images, as the trained one's are: with the initial 0 and 1 it would be a worse
    baseline than it is.

    Raises:
        UserError: the run has no checkpoint.
        InfrastructureError: ranks see different ones.
    """
    pretrain, world = evaluation.pretrain, evaluation.world
    run = RunFolder(evaluation.config.run_dir)
    remember(evaluation.config.data.root or pretrain.data.root, run.data_roots, world)  # no mistake was found
    if name == "pixels":
        dim = 3 * min(evaluation.crop, MAX_PIXEL_SIDE) ** 2
        return FrozenEncoder(name, 0, Pixels(), dim, pretrain, torch.float32, world.device)
    encoder = build_encoder(pretrain.model, pretrain.run.seed, evaluation.crop)
    step = 0
    if name == "trained":
        step = load_trained(encoder, evaluation.config.run_dir, world)
        if len(steps := all_gather(torch.tensor([step], device=world.device), world).unique()) > 1:
            raise InfrastructureError(
                f"ranks see different newest checkpoints, of steps {steps.tolist()}; is the run going on?"
            )
    found = _of_backbone(name, step, encoder.to(world.device), evaluation)
    if name == "untrained":
        _calibrate(found, evaluation)
    return found


def frozen_copy(encoder: nn.Module, step: int, evaluation: Evaluation) -> FrozenEncoder:
    """A query encoder in the middle of its training, with running statistics averaged over ranks. Called by all."""
    weights_dtype = next(encoder.parameters()).dtype
    copy = build_encoder(evaluation.pretrain.model, 0, evaluation.crop).to(evaluation.world.device, weights_dtype)
    copy.load_state_dict({**encoder.state_dict(), **checkpoint.averaged(encoder, evaluation.world)})
    return _of_backbone("trained", step, copy, evaluation)


def _of_backbone(name: str, step: int, encoder: nn.Module, evaluation: Evaluation) -> FrozenEncoder:
    """The backbone, with those layers of the head above it that the evaluation keeps."""
    module, dim = encoder.get_submodule("backbone"), int(encoder.feature_dim)  # type: ignore[arg-type]
    if keep := evaluation.config.transfer.keep_head_layers:
        head = encoder.get_submodule("head")
        assert isinstance(head, nn.Sequential)  # Linear, ReLU, ..., Linear
        module = nn.Sequential(module, head[: 2 * keep])
        dim = int(head[2 * keep - 2].out_features)  # type: ignore[arg-type]
    module.eval().requires_grad_(False)
    return FrozenEncoder(name, step, module, dim, evaluation.pretrain, evaluation.dtype, evaluation.world.device)


def _calibrate(encoder: FrozenEncoder, evaluation: Evaluation) -> None:
    """Set BatchNorm statistics to the mean over BN groups of centre crops, drawn from the training images."""
    world, group_size = evaluation.world, evaluation.pretrain.model.bn_group_size
    num_groups = -(-CALIBRATION_SAMPLES // group_size)
    order = np.random.default_rng([3, evaluation.pretrain.run.seed]).permutation(len(evaluation.train.paths))
    samples = np.resize(order, num_groups * group_size)
    data = evaluation.config.data.model_copy(update={"batch_size": group_size})
    norms = [m for m in encoder.module.modules() if isinstance(m, GroupedBatchNorm2d)]
    if not norms:
        return
    encoder.module.train()
    batches = eval_batches(evaluation.train, samples, data, evaluation.resize, evaluation.crop, world)
    told = Told("BatchNorm statistics of the untrained network", num_groups, "batches", world)
    with contextlib.closing(batches), told:
        for i, (views, _) in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (i + 1)
            encoder(views)
            told.add()
    encoder.module.eval()
    for buffer in running_statistics(encoder.module).values():
        buffer.copy_(all_gather(buffer[None], world)[0])  # rank 0's, in case GPUs round differently


@contextlib.contextmanager
def frozen(encoder: FrozenEncoder) -> Iterator[None]:
    """Check that the encoder comes out of a `with` as it went in: weights and BatchNorm statistics, bit by bit.

    Raises:
        RuntimeError: it has changed.
    """
    before = digest(encoder.module)
    yield
    if digest(encoder.module) != before:
        raise RuntimeError(f"the {encoder.name} encoder changed while it was evaluated; its results mean nothing")


def digest(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer: name, shape, dtype and bits."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def write_result(
    evaluation: Evaluation, kind: str, encoder: FrozenEncoder, accuracy: dict[str, float], seconds: float, **more: Any
) -> dict[str, Any]:
    """Write RUN/eval/KIND_ENCODER.json on rank 0; with a part of the labels or of the head, under a name that says so.

    Args:
        evaluation: settings.
        kind: knn, linear or finetune.
        encoder: what was evaluated.
        accuracy: percent, by name.
        seconds: wall-clock time of the whole evaluation.
        more: further entries.

    Returns:
        what was written, on every rank.
    """
    fraction, keep = evaluation.config.data.label_fraction, evaluation.config.transfer.keep_head_layers
    variant = (f"_labels{fraction:g}" if fraction < 1 else "") + (f"_head{keep}" if keep else "")
    result = {
        "encoder": encoder.name,
        "variant": variant,
        "step": encoder.step,
        "num_train": len(evaluation.train.paths),
        "num_val": len(evaluation.val.paths),
        "accuracy": accuracy,
        "seconds": round(seconds, 2),
        **more,
    }
    if evaluation.world.is_main:
        path = RunFolder(evaluation.config.run_dir).result(kind, encoder.name, variant)
        write_whole(path, json.dumps(result, indent=1).encode())
    return result


def write_trained(
    evaluation: Evaluation,
    kind: str,
    encoder: FrozenEncoder,
    accuracy: dict[str, float],
    seconds: float,
    curve: list[dict[str, float]],
    per_class: list[float],
    progress: Path,
    **more: Any,
) -> dict[str, Any]:
    """`write_result` of a training with labels; what was kept of it on the way goes when the result is there.

    Args:
        evaluation: settings.
        kind: linear or finetune.
        encoder: what was evaluated.
        accuracy: percent, by name.
        seconds: wall-clock time of the whole evaluation.
        curve: a dict an epoch.
        per_class: top-1 in percent of each class; nan where it has no validation image.
        progress: the file that the training went on from.
        more: further entries.
    """
    named = {
        name: None if math.isnan(top1) else round(top1, 2)
        for name, top1 in zip(evaluation.train.classes, per_class, strict=True)
    }
    device_hours = round(seconds * evaluation.world.world_size / 3600, 4)
    result = write_result(
        evaluation, kind, encoder, accuracy, seconds, curve=curve, per_class=named, device_hours=device_hours, **more
    )
    if evaluation.world.is_main:
        progress.unlink(missing_ok=True)
    return result
