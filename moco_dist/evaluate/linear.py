"""Linear evaluation: a linear classifier on the frozen backbone (MoCo v1, arXiv 1911.05722, sec. 4.1).

Weights N(0, 0.01), biases 0, SGD at the rate 30 without weight decay. `features: augmented` is the published recipe:
every epoch encodes new crops of every image. `features: cached` trains on features of centre crops that were encoded
once; there each dimension is standardised by the training set and divided by sqrt(D), so that the same rate suits
every encoder, whatever the size of its features.

A step is a function of (seed, epoch, batch): the gradient is the sum over ranks, divided by the samples of the whole
batch, so the number of ranks changes nothing but the order of sums. Validation images are counted once.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moco_dist.config import LinearConfig
from moco_dist.data import counter_rng
from moco_dist.data.crops import crop_box, crop_draws, is_flipped
from moco_dist.data.torchvision_loader import Crops
from moco_dist.distributed.collectives import all_reduce_sum
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.evaluate.features import Features, extract
from moco_dist.evaluate.subject import (
    Evaluation,
    FrozenEncoder,
    digest,
    frozen,
    frozen_encoder,
    open_evaluation,
    write_atomically,
    write_result,
)  # fmt: skip

FLIP_PROBABILITY = 0.5
CURVE_POINTS = 20
# Epoch to this rank's part of each of its batches: features, labels, and the size of the whole batch.
Feed = Callable[[int], Iterator[tuple[Tensor, Tensor, int]]]


def run_linear(config: LinearConfig, world: World) -> list[dict[str, Any]]:
    """`moco-dist linear`: the accuracy of each of `config.encoders`, into RUN/eval/linear_ENCODER.json, by all ranks.

    Returns:
        what was written, one dict an encoder; accuracies in percent, and as `curve` the mean loss of every epoch with
        the validation accuracy after some.

    Raises:
        UserError: there is no run, no checkpoint or no labelled images, or a batch has less than a sample a rank.
        RuntimeError: the backbone changed.
    """
    evaluation = open_evaluation(config, world)
    batch_size = min(config.global_batch_size, len(evaluation.train.paths))
    if batch_size < world.world_size:
        raise UserError(f"global_batch_size: {batch_size} is less than one sample for each of {world.world_size} ranks")
    results = []
    for name in config.encoders:
        started = time.perf_counter()
        encoder = frozen_encoder(evaluation, name)
        with frozen(encoder):
            accuracy, curve = _train(evaluation, config, encoder)
        seconds = time.perf_counter() - started
        results.append(write_result(evaluation, "linear", encoder, accuracy, seconds, curve=curve))
    return results


def _train(
    evaluation: Evaluation, config: LinearConfig, encoder: FrozenEncoder
) -> tuple[dict[str, float], list[dict[str, float]]]:
    world, num_classes = evaluation.world, len(evaluation.train.classes)
    val = extract(evaluation, encoder, "val").to(world.device)
    progress = None
    if config.features == "cached":
        train = extract(evaluation, encoder, "train").to(world.device)
        standardise(train, val, world)
        feed = functools.partial(cached_batches, train, config)
    else:
        feed = functools.partial(augmented_batches, evaluation, config, encoder)
        progress = _progress_path(evaluation, config, encoder)
    return train_classifier(feed, val, num_classes, config, world, progress)


def train_classifier(
    feed: Feed, val: Features, num_classes: int, config: LinearConfig, world: World, progress: Path | None = None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Train the classifier. Called by all ranks.

    Args:
        feed: an epoch's batches.
        val: this rank's validation features.
        num_classes: size of the output.
        config: the recipe.
        world: this process.
        progress: a file to keep the classifier in after every epoch, and to go on from.

    Returns:
        accuracies in percent, and a dict an epoch.

    Raises:
        UserError: the loss is not finite any more.
    """
    classifier = initial_classifier(val.values.shape[1], num_classes, config.seed).to(world.device)
    sgd = torch.optim.SGD(
        classifier.parameters(), lr=config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay
    )
    curve = _load_progress(progress, classifier, sgd) if progress else []
    accuracy = top_accuracies(classifier, val, world)
    for epoch in range(len(curve), config.epochs):
        for group in sgd.param_groups:
            group["lr"] = config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
        loss_sum, seen = torch.zeros((), device=world.device), 0
        for features, labels, batch_size in feed(epoch):
            loss = F.cross_entropy(classifier(features), labels, reduction="sum")
            (loss / batch_size).backward()
            _sum_gradients(classifier, world)
            sgd.step()
            sgd.zero_grad()
            loss_sum += loss.detach()
            seen += batch_size
        mean_loss = all_reduce_sum(loss_sum, world).item() / seen
        if not math.isfinite(mean_loss):
            raise UserError(f"the linear classifier's loss is {mean_loss}; an lr below {config.lr:g} may be stable")
        curve.append({"epoch": epoch + 1, "loss": mean_loss})
        if (epoch + 1) % max(1, config.epochs // CURVE_POINTS) == 0 or epoch + 1 == config.epochs:
            accuracy = top_accuracies(classifier, val, world)
            curve[-1]["top1"] = accuracy["linear_top1"]
        if progress and world.is_main:
            _save_progress(progress, classifier, sgd, curve)
    if progress and world.is_main:
        progress.unlink()
    return accuracy, curve


def initial_classifier(dim: int, num_classes: int, seed: int) -> nn.Linear:
    """Weights N(0, 0.01) and biases 0, the same for the same seed."""
    classifier = nn.Linear(dim, num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def global_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The epoch's batches over all ranks: a permutation, cut into whole batches; at least one.

    The samples past the last whole batch are left out of this epoch; the next one permutes all of them anew.
    """
    order = np.random.default_rng([4, seed, epoch]).permutation(num_samples)
    batch_size = min(batch_size, num_samples)
    return [order[i : i + batch_size] for i in range(0, num_samples - batch_size + 1, batch_size)]


def cached_batches(train: Features, config: LinearConfig, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Those samples of each batch whose features this rank has: few here, many there, over all ranks each once."""
    place = torch.full((train.total,), -1, device=train.rows.device)
    place[train.rows] = torch.arange(len(train.rows), device=train.rows.device)
    for batch in global_batches(train.total, config.global_batch_size, config.seed, epoch):
        own = place[torch.from_numpy(batch).to(place.device)]
        own = own[own >= 0]
        yield train.values[own], train.labels[own], len(batch)


def augmented_batches(
    evaluation: Evaluation, config: LinearConfig, encoder: FrozenEncoder, epoch: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """This rank's samples of each batch: random resized crops and flips, through the encoder."""
    train, world, num_workers = evaluation.train, evaluation.world, config.data.num_workers
    labels = torch.from_numpy(train.labels)
    batches = global_batches(len(train.paths), config.global_batch_size, config.seed, epoch)
    own = [batch[world.rank :: world.world_size] for batch in batches]
    crop = functools.partial(
        random_crop, size=evaluation.crop, scale=config.crop_scale, seed=config.seed, epoch=epoch
    )
    loader = DataLoader(
        Crops(train, own, crop), batch_size=None, sampler=range(len(own)), num_workers=num_workers,
        pin_memory=world.device != "cpu",
    )  # fmt: skip
    for views, samples, batch in zip(loader, own, batches, strict=True):
        yield encoder(views), labels[torch.from_numpy(samples)].to(world.device), len(batch)


def random_crop(
    image: Image.Image, sample: int, *, size: int, scale: tuple[float, float], seed: int, epoch: int
) -> NDArray[np.uint8]:
    """(size, size, 3): a random resized crop, mirrored half of the time; a function of (seed, epoch, sample)."""
    draws = crop_draws(seed, epoch, np.array([sample]), counter_rng.STREAM_LINEAR)[0]
    cropped = image.crop(crop_box(draws, image.width, image.height, scale))
    pixels = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if is_flipped(draws, FLIP_PROBABILITY) else pixels


@torch.no_grad()
def standardise(train: Features, val: Features, world: World) -> None:
    """Shift and scale each dimension, in place, to mean 0 and variance 1/D over all ranks' training features.

    The squared length of a feature is then 1 on average. A dimension that never changes becomes 0.
    """
    dim = train.values.shape[1]
    mean = all_reduce_sum(train.values.sum(0, dtype=torch.float64), world) / train.total
    for features in (train, val):
        features.values.sub_(mean)
    squares = torch.linalg.vector_norm(train.values, dim=0, dtype=torch.float64).square()
    std = (all_reduce_sum(squares, world) / train.total).sqrt()
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)
    for features in (train, val):
        features.values.div_(std * math.sqrt(dim))


@torch.no_grad()
def top_accuracies(classifier: nn.Linear, val: Features, world: World) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent over all ranks' validation samples (top-C where there are C < 5 classes)."""
    counts = torch.zeros(2, dtype=torch.int64, device=val.values.device)
    for values, labels in zip(val.values.split(4096), val.labels.split(4096), strict=True):
        best = classifier(values).topk(min(5, classifier.out_features), dim=1).indices
        hits = best == labels[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum()])
    top1, top5 = all_reduce_sum(counts, world).tolist()
    return {"linear_top1": 100 * top1 / val.total, "linear_top5": 100 * top5 / val.total}


def _sum_gradients(classifier: nn.Linear, world: World) -> None:
    """Every gradient summed over ranks, by one all-reduce."""
    if world.world_size == 1:
        return
    gradients = [p.grad for p in classifier.parameters() if p.grad is not None]
    total = all_reduce_sum(torch.cat([g.flatten() for g in gradients]), world)
    for gradient, piece in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def _progress_path(evaluation: Evaluation, config: LinearConfig, encoder: FrozenEncoder) -> Path:
    """A file whose name holds a hash of all that the training depends on."""
    where_and_how_fast = {"run": True, "encoders": True, "device": True, "tracking": True,
                          "data": {"root", "num_workers", "batch_size"}}
    facts = [
        digest(encoder.module), str(encoder.dtype), evaluation.resize, evaluation.crop,
        hashlib.sha256("\n".join(evaluation.train.paths).encode()).hexdigest(),
        config.model_dump(mode="json", exclude=where_and_how_fast),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return config.run_dir / "eval" / f".linear_{encoder.name}_{key}.safetensors"


def _save_progress(path: Path, classifier: nn.Linear, sgd: torch.optim.SGD, curve: list[dict[str, float]]) -> None:
    tensors = dict(classifier.state_dict())
    for name, parameter in classifier.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in sgd.state[parameter].items() if value is not None}
    content = safetensors.torch.save(tensors, metadata={"curve": json.dumps(curve)})
    write_atomically(path, content)


def _load_progress(path: Path, classifier: nn.Linear, sgd: torch.optim.SGD) -> list[dict[str, float]]:
    """Fill classifier and SGD; returns the curve so far, empty where there is no such file."""
    if not path.is_file():
        return []
    with safetensors.safe_open(path, "pt", device=str(classifier.weight.device)) as file:
        for name, parameter in classifier.named_parameters():
            parameter.data.copy_(file.get_tensor(name))
            for key in file.keys():  # noqa: SIM118, it is no dict
                if key.startswith(f"{name}."):
                    sgd.state[parameter][key.removeprefix(f"{name}.")] = file.get_tensor(key)
        return json.loads(file.metadata()["curve"])
