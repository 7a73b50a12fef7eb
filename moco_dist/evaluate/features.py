"""Features of images, encoded once: kept on disk in chunks, so that what was interrupted goes on where it was.

A rank that is asked to stop writes the chunk that is under way as far as it is.

A chunk is CHUNK_SAMPLES consecutive images whatever the number of ranks, in RUN/eval/features/KEY/. KEY is a hash of
everything that features depend on, so another checkpoint, crop or subset has its own folder, and nothing is ever
out of date unless images were changed under the same name. The folder has to be one that all ranks see.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from moco_dist.data.images import ImageFolder
from moco_dist.data.loaders import eval_batches
from moco_dist.distributed.collectives import all_reduce_sum
from moco_dist.distributed.stop import StopRequest
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError, Preempted
from moco_dist.evaluate.subject import Evaluation, FrozenEncoder, digest
from moco_dist.files import key_of, write_whole
from moco_dist.run.folder import RunFolder

CHUNK_SAMPLES = 512
STANDARDISE_ROWS = 65_536


@dataclass(frozen=True)
class Features:
    """This rank's share of the features of a split: whole chunks, on some ranks maybe none.

    Attributes:
        values: float32 (n, D).
        labels: int64 (n,).
        rows: int64 (n,), the images' numbers in the split.
        total: rows over all ranks.
    """

    values: Tensor
    labels: Tensor
    rows: Tensor
    total: int

    def to(self, device: str) -> "Features":
        """The same on `device`."""
        return Features(self.values.to(device), self.labels.to(device), self.rows.to(device), self.total)


def extract(
    evaluation: Evaluation,
    encoder: FrozenEncoder,
    split: Literal["train", "val"],
    keep: bool = True,
    stop: StopRequest | None = None,
) -> Features:
    """Features of a split's centre crops, on the CPU. Each rank encodes its chunks, and no image is encoded twice.

    Args:
        evaluation: settings and images.
        encoder: what gives the features.
        split: which images.
        keep: write chunks to RUN/eval/features, and read those that are there.
        stop: who may ask for an end; None: nobody.

    Raises:
        Preempted: this rank was asked to stop.
    """
    folder = evaluation.train if split == "train" else evaluation.val
    chunks = own_chunks(len(folder.paths), evaluation.world)
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(c.start, c.stop) for c in chunks)])
    values = torch.empty(len(rows), encoder.dim)
    places = dict(zip(chunks, values.split([len(chunk) for chunk in chunks]), strict=True)) if chunks else {}
    cache = RunFolder(evaluation.config.run_dir).features(_key(evaluation, encoder, split, folder)) if keep else None

    filled = {chunk: _read(_path(cache, chunk), place) if cache else 0 for chunk, place in places.items()}
    missing = [chunk[count:] for chunk, count in filled.items() if count < len(chunk)]
    unfinished = [chunk for chunk, count in filled.items() if count < len(chunk)]
    told = Told(f"{encoder.name} features, {split}", len(rows), "images", evaluation.world, sum(filled.values()))
    with told, contextlib.closing(_encode(evaluation, encoder, folder, missing)) as batches:
        for encoded in batches:
            told.add(len(encoded))
            is_asked = stop is not None and stop.is_asked
            while len(encoded):
                chunk = unfinished[0]
                start = filled[chunk]
                count = min(len(chunk) - start, len(encoded))
                places[chunk][start : start + count] = encoded[:count]
                filled[chunk], encoded = start + count, encoded[count:]
                is_whole = filled[chunk] == len(chunk)
                if cache is not None and (is_whole or (is_asked and not len(encoded))):
                    packed = safetensors.torch.save({"features": places[chunk][: filled[chunk]].contiguous()})
                    write_whole(_path(cache, chunk), packed)
                if is_whole:
                    unfinished.pop(0)
            if is_asked and unfinished:
                raise Preempted(f"{sum(filled.values()):,} of {len(rows):,} features of {split} are encoded")
    return Features(values, torch.tensor(folder.labels)[rows], rows, len(folder.paths))


def own_chunks(total: int, world: World) -> list[range]:
    """This rank's chunks, as ranges of rows. Ranks take turns, so that all share what an interruption left."""
    starts = range(world.rank * CHUNK_SAMPLES, total, world.world_size * CHUNK_SAMPLES)
    return [range(start, min(start + CHUNK_SAMPLES, total)) for start in starts]


def kept(evaluation: Evaluation, encoder: FrozenEncoder, split: Literal["train", "val"]) -> Iterator[Tensor]:
    """What `extract` of all ranks has written, float32 (n, D) chunk by chunk, in the order of the images.

    Raises:
        InfrastructureError: a chunk is not there.
    """
    folder = evaluation.train if split == "train" else evaluation.val
    cache = RunFolder(evaluation.config.run_dir).features(_key(evaluation, encoder, split, folder))
    for chunk in own_chunks(len(folder.paths), World()):
        values = torch.empty(len(chunk), encoder.dim)
        if _read(path := _path(cache, chunk), values) < len(chunk):
            raise InfrastructureError(
                f"{path} of another rank is not here; it has to lie on a disk that all hosts share"
            )
        yield values


@torch.no_grad()
def standardise(train: Features, val: Features, world: World) -> None:
    """Shift and scale each dimension, in place, to mean 0 and variance 1/D over all ranks' training features.

    The squared length of a feature is then 1 on average. A dimension that never changes becomes 0.

    STANDARDISE_ROWS rows at a time, since the arithmetic is in float64, and a copy of ImageNet's features in float64
    is 21 GB. Up to so many rows a rank the result is that of all rows at once, bit for bit. Beyond that, the sums are
    added in another order, as they are for another number of ranks: they differ by the rounding of float64.
    """
    dim = train.values.shape[1]
    mean = all_reduce_sum(_summed(train, lambda rows: rows.sum(0, dtype=torch.float64)), world) / train.total
    for features in (train, val):
        for rows in features.values.split(STANDARDISE_ROWS):
            rows.sub_(mean)
    squares = _summed(train, lambda rows: torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square())
    std = (all_reduce_sum(squares, world) / train.total).sqrt()
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)
    for features in (train, val):
        for rows in features.values.split(STANDARDISE_ROWS):
            rows.div_(std * math.sqrt(dim))


def _summed(features: Features, of_rows: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of what `of_rows` (n, D) -> (D,) gives for some rows at a time."""
    return torch.stack([of_rows(rows) for rows in features.values.split(STANDARDISE_ROWS)]).sum(0)


def _encode(
    evaluation: Evaluation, encoder: FrozenEncoder, folder: ImageFolder, parts: list[range]
) -> Generator[Tensor, None, None]:
    """The features of the images of all parts in order, batch by batch, by one loader."""
    if not parts:
        return
    samples = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    batches = eval_batches(
        folder, samples, evaluation.config.data, evaluation.resize, evaluation.crop, evaluation.world
    )
    with contextlib.closing(batches):
        for views, _ in batches:
            yield encoder(views).cpu()


def _key(evaluation: Evaluation, encoder: FrozenEncoder, split: str, folder: ImageFolder) -> str:
    facts = {
        "encoder": encoder.name,
        "weights": digest(encoder.module),
        "model": evaluation.pretrain.model.model_dump(mode="json", exclude={"init"}),
        "normalisation": [evaluation.pretrain.augment.mean, evaluation.pretrain.augment.std],
        "dtype": str(encoder.dtype),
        "images": str(folder.root.resolve()),
        "split": split,
        "paths": folder.list_hash,
        "loader": evaluation.config.data.loader,
        "size": [evaluation.resize, evaluation.crop],
        "chunk": CHUNK_SAMPLES,
    }
    return key_of(facts)


def _path(cache: Path, chunk: range) -> Path:
    return cache / f"{chunk.start:09d}.safetensors"


def _read(path: Path, place: Tensor) -> int:
    """Fill `place` with what there is of a chunk; returns how many rows, 0 where it is missing or damaged."""
    try:
        features = safetensors.torch.load_file(path)["features"]
    except (FileNotFoundError, KeyError, safetensors.SafetensorError):
        return 0
    if features.ndim != 2 or len(features) > len(place) or features.shape[1] != place.shape[1]:
        return 0
    place[: len(features)] = features
    return len(features)
