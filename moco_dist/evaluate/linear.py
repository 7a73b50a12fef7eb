"""Linear evaluation: a linear classifier on the frozen backbone (MoCo v1, arXiv 1911.05722, sec. 4.1).

Weights N(0, 0.01), biases 0, SGD at the rate 30 without weight decay. `features: augmented` is the published recipe:
every epoch encodes new crops of every image. `features: cached` trains on features of centre crops that were encoded
once; there each dimension is standardised by the training set and divided by sqrt(D), so that the same rate suits
every encoder, whatever the size of its features. `sweep` trains further classifiers on the very same features.

A step is a function of (seed, epoch, batch). Validation images are counted once.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.config.evaluate import LinearConfig
from moco_dist.data.batch import to_device
from moco_dist.data.images import rows_of
from moco_dist.distributed.collectives import gather_uneven
from moco_dist.distributed.stop import StopRequest
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.evaluate.batches import crop_batches, global_batches
from moco_dist.evaluate.classifiers import Outcome, held_out, together, train_classifiers
from moco_dist.evaluate.features import Features, extract, standardise
from moco_dist.evaluate.progress import SAVE_SECONDS, progress_path
from moco_dist.evaluate.subject import (
    Evaluation,
    FrozenEncoder,
    frozen,
    frozen_encoder,
    open_evaluation,
    write_trained,
)  # fmt: skip


def run_linear(config: LinearConfig, world: World) -> list[dict[str, Any]]:
    """`moco-dist linear`: the accuracy of each of `config.encoders`, into RUN/eval/linear_ENCODER.json, by all ranks.

    Returns:
        what was written, one dict an encoder; accuracies in percent; as `curve` the mean loss of every epoch with the
        validation accuracy after some; `per_class`; `sweep`, where there is one; and what it cost.

    Raises:
        UserError: there is no run, no checkpoint or no labelled images, a batch has less than a sample a rank, or a
            sweep has no image to choose by.
        Preempted: somebody asked for an end; what was done is kept.
        RuntimeError: the backbone changed.
    """
    evaluation = open_evaluation(config, world)
    batch_size = min(config.global_batch_size, len(evaluation.train.paths))
    if batch_size < world.world_size:
        raise UserError(f"global_batch_size: {batch_size} is less than one sample for each of {world.world_size} ranks")
    if config.sweep.lrs and not held_out(evaluation.train.labels, config.sweep.held_out_share, config.seed).any():
        raise UserError(
            "sweep.lrs: the best rate is chosen by training images that are held out, and no class has two or more; "
            "use more labels, or leave the sweep out: --sweep.lrs '[]'"
        )
    results = []
    for name in config.encoders:
        started = time.perf_counter()
        encoder = frozen_encoder(evaluation, name)
        progress = progress_path(evaluation, "linear", encoder, batch_size)
        with StopRequest(SAVE_SECONDS, world) as stop, frozen(encoder):
            outcome = _train(evaluation, config, encoder, progress, stop)
        seconds = time.perf_counter() - started
        results.append(write_trained(
            evaluation, "linear", encoder, outcome.accuracy, seconds, outcome.curve, outcome.per_class, progress,
            **({"sweep": outcome.sweep} if outcome.sweep else {}),
        ))  # fmt: skip
    return results


def _train(
    evaluation: Evaluation, config: LinearConfig, encoder: FrozenEncoder, progress: Path, stop: StopRequest
) -> Outcome:
    world, labels = evaluation.world, evaluation.train.labels
    left_out = np.flatnonzero(held_out(labels, config.sweep.held_out_share, config.seed))
    val = extract(evaluation, encoder, "val", stop=stop).to(world.device)
    if config.features == "cached":
        train = extract(evaluation, encoder, "train", stop=stop).to(world.device)
        standardise(train, val, world)
        feed = cached_batches(train, config, world)
        left_out_features = functools.partial(_part, train, left_out)
    else:
        feed = functools.partial(augmented_batches, evaluation, config, encoder)
        left_out_only = dataclasses.replace(evaluation, train=rows_of(evaluation.train, left_out))
        left_out_features = lambda: extract(left_out_only, encoder, "train", stop=stop).to(world.device)  # noqa: E731
    return train_classifiers(
        feed, labels, val, left_out_features if config.sweep.lrs else None, len(evaluation.train.classes), config,
        world, progress, stop,
    )  # fmt: skip


def _part(train: Features, rows: NDArray[np.int64]) -> Features:
    """This rank's share of some rows."""
    own = torch.isin(train.rows, torch.from_numpy(rows).to(train.rows.device))
    return Features(train.values[own], train.labels[own], train.rows[own], len(rows))


def cached_batches(train: Features, config: LinearConfig, world: World):
    """The feed of features that were encoded once: few of a batch here, many there, gathered on all ranks."""
    place = torch.full((train.total,), -1, device=train.rows.device)
    place[train.rows] = torch.arange(len(train.rows), device=train.rows.device)
    owner = np.empty(train.total, dtype=np.int64)
    owner[gather_uneven(train.rows, world).cpu().numpy()] = (
        gather_uneven(torch.full_like(train.rows, world.rank), world).cpu().numpy()
    )

    def feed(epoch: int, first: int) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        for batch in global_batches(train.total, config.global_batch_size, config.seed, epoch)[first:]:
            own = batch[owner[batch] == world.rank]
            values = train.values[place[to_device(own, place.device)]]
            yield together(values, owner[batch], world), batch

    return feed


def augmented_batches(
    evaluation: Evaluation, config: LinearConfig, encoder: FrozenEncoder, epoch: int, first: int
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """An epoch's random resized crops and flips, each through the encoder of one rank, gathered on all."""
    world = evaluation.world
    batches = global_batches(len(evaluation.train.paths), config.global_batch_size, config.seed, epoch)[first:]
    if not batches:
        return
    own = [batch[world.rank :: world.world_size] for batch in batches]
    with contextlib.closing(crop_batches(evaluation, own, config.crop_scale, config.seed, epoch)) as loader:
        for views, batch in zip(loader, batches, strict=True):
            yield together(encoder(views), np.arange(len(batch)) % world.world_size, world), batch
