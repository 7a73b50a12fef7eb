"""Features of any images, with labels or without, by the backbone of a run or of a file of weights."""

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.config.address import Url
from moco_dist.config.evaluate import EvalConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.data.images import NO_CLASS, ImageFolder
from moco_dist.data.loaders import eval_batches, is_packed
from moco_dist.data.sources import find_images
from moco_dist.distributed.collectives import barrier
from moco_dist.distributed.once import once_a_host
from moco_dist.distributed.stop import StopRequest
from moco_dist.distributed.world import World
from moco_dist.engine.precision import compute_dtype, slow_on_cpu
from moco_dist.errors import UserError, nearest
from moco_dist.evaluate.features import extract, kept
from moco_dist.evaluate.overview import Overview, overview
from moco_dist.evaluate.subject import Evaluation, FrozenEncoder, digest, frozen
from moco_dist.files import whole_file
from moco_dist.method.encoder import build_encoder
from moco_dist.provenance import __version__
from moco_dist.run.folder import RunFolder
from moco_dist.run.start import fill

SUFFIXES = (".parquet", ".npz")
THUMBNAIL_PIXELS = 96
Thumbnails = Callable[[list[int]], dict[int, NDArray[np.uint8]]]


@dataclass(frozen=True)
class OpenedBackbone:
    """A frozen backbone, and what an image goes through before it.

    Attributes:
        encoder: uint8 crops to features.
        resize, crop: short side before the centre crop, and the crop's side, in pixels.
        identity: what features depend on beside the images, as plain values.
    """

    encoder: FrozenEncoder
    resize: int
    crop: int
    identity: dict[str, Any]


def open_backbone(
    source: Path,
    world: World,
    arch: str = "resnet50",
    stem: str = "imagenet",
    image_size: int | None = None,
    precision: str = "auto",
) -> OpenedBackbone:
    """The backbone of a run or of a file that `moco-dist import` reads. Called by all ranks.

    Args:
        source: the folder or the file.
        world: this process.
        arch: network in a file, as in `model.arch`; a run's settings say its own.
        stem: likewise, as in `model.stem`.
        image_size: side of the centre crop in pixels; default: the run's, and 224 for a file.
        precision: as in `optim.precision`.

    Raises:
        UserError: it is neither, or does not fit the network.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; the folder of a run, or a file of weights, is expected")
    if source.is_dir():
        pretrain = RunFolder(source).settings()
    else:
        of_file = {"run.dir": source.parent, "data.root": source.parent, "model.arch": arch, "model.stem": stem}
        words = [word for name, value in of_file.items() for word in (f"--{name}", str(value))]
        pretrain = read_config(PretrainConfig, None, words)
    crop = image_size or pretrain.data.image_size
    whole = build_encoder(pretrain.model, 0, crop)
    backbone = whole.get_submodule("backbone")
    step = fill([backbone], source, pretrain.model, world).step
    backbone.to(world.device).eval().requires_grad_(False)
    dtype, resize = compute_dtype(precision, world.device), round(crop * 8 / 7)
    encoder = FrozenEncoder("trained", step, backbone, whole.feature_dim, pretrain, dtype, world.device)
    identity = {
        "source": str(source.resolve()), "step": step, "arch": pretrain.model.arch, "stem": pretrain.model.stem,
        "weights_sha256": digest(backbone), "mean": list(pretrain.augment.mean), "std": list(pretrain.augment.std),
        "resize": resize, "crop": crop, "dtype": str(dtype), "moco_dist": __version__,
    }  # fmt: skip
    return OpenedBackbone(encoder, resize, crop, identity)


def images_of(root: Path | Url, index_folder: Path | None, world: World) -> ImageFolder:
    """All images of a folder, of tar shards or of a packed file, also at an address; of `train` where there is one."""
    return once_a_host(lambda: find_images(root, "train", index_folder is not None, index_folder), str(root), world)


def evaluation_of(opened: OpenedBackbone, images: ImageFolder, config: EvalConfig, world: World) -> Evaluation:
    """What `extract` takes, with the images as both splits."""
    data = config.data.model_copy(update={"loader": "ffcv" if is_packed(images) else "torchvision"})
    config, encoder = config.model_copy(update={"data": data}), opened.encoder
    return Evaluation(config, encoder.pretrain, images, images, opened.resize, opened.crop, encoder.dtype, world)


def require_suffix(out: Path) -> None:
    """Refuse what no features can be written to.

    Raises:
        UserError: another ending, or pyarrow is not installed.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out} ends in none of {', '.join(SUFFIXES)}{nearest(out.suffix, SUFFIXES)}")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            how = "install it by pip install 'moco_dist[parquet]', or write a .npz"
            raise UserError(f"--out {out}: {error}; {how}") from error


def write_features(
    opened: OpenedBackbone, root: Path | Url, out: Path, config: EvalConfig, world: World
) -> ImageFolder:
    """Write the features of all images of `root` into one file. Called by all ranks, each of which encodes its share.

    What is encoded is kept in `config.run_dir` until the file is written, so that the same call goes on where it was
    stopped.

    Args:
        opened: the backbone.
        root: images, with labels or without.
        out: .parquet, written chunk by chunk, or .npz, for which rank 0 holds all features in memory twice.
        config: batch size and workers; `run_dir` is a folder of its own that all ranks see.
        world: this process.

    Returns:
        the images.

    Raises:
        UserError: there is no image, or one cannot be read.
        Preempted: somebody asked for an end.
    """
    images = images_of(root, RunFolder(config.run_dir).indices, world)
    evaluation = evaluation_of(opened, images, config, world)
    if world.is_main and (slow := slow_on_cpu(evaluation.dtype, world.device)):
        print(slow, file=sys.stderr)
    with StopRequest(math.inf, world) as stop, frozen(opened.encoder):
        extract(evaluation, opened.encoder, "train", stop=stop)
    barrier(world)
    if world.is_main:
        write = _write_parquet if out.suffix == ".parquet" else _write_npz
        facts = {**opened.identity, "images": str(images.root.resolve())}
        with whole_file(out) as partial:
            write(partial, kept(evaluation, opened.encoder, "train"), images, opened.encoder.dim, facts)
    barrier(world)
    return images


def look_at(opened: OpenedBackbone, images: ImageFolder, config: EvalConfig) -> tuple[Overview, Thumbnails]:
    """What `write_features` has left in `config.run_dir`, to look at: by one rank alone.

    Returns:
        the overview, and a function from numbers of images to their pictures, uint8 (S, S, 3).
    """
    evaluation = evaluation_of(opened, images, config, World())

    def thumbnails_of(numbers: list[int]) -> dict[int, NDArray[np.uint8]]:
        rows, side = np.array(numbers, dtype=np.int64), THUMBNAIL_PIXELS
        with contextlib.closing(
            eval_batches(images, rows, evaluation.config.data, side, side, evaluation.world)
        ) as batches:
            views = [view.permute(1, 2, 0).cpu().numpy().copy() for crops, _ in batches for view in crops]
        return dict(zip(numbers, views, strict=True))

    chunks = functools.partial(kept, evaluation, opened.encoder, "train")
    return overview(chunks, len(images.paths)), thumbnails_of


def _write_parquet(path: Path, chunks: Iterable[Tensor], images: ImageFolder, dim: int, facts: dict[str, Any]) -> None:
    """Columns `path`, `features` and, where there are classes, `label` and `class`; a row group a chunk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [("path", pa.string()), ("features", pa.list_(pa.float32(), dim))]
    columns += [("label", pa.int64()), ("class", pa.string())] if images.classes else []
    schema = pa.schema(columns, metadata={"moco_dist": json.dumps(facts)})
    names, start = dict(enumerate(images.classes)), 0
    with pq.ParquetWriter(path, schema) as writer:
        for values in chunks:
            rows = range(start, start + len(values))
            labels = [None if label == NO_CLASS else int(label) for label in images.labels[rows.start : rows.stop]]
            table = {
                "path": [images.paths[row] for row in rows],
                "features": pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().ravel()), dim),
            }
            if images.classes:
                table |= {"label": labels, "class": [None if label is None else names[label] for label in labels]}
            writer.write_table(pa.table(table, schema=schema))
            start = rows.stop


def _write_npz(path: Path, chunks: Iterable[Tensor], images: ImageFolder, dim: int, facts: dict[str, Any]) -> None:
    """Arrays `paths`, `features` (N, D), `labels` (-1: none), `classes`, and `model`, a text of JSON; no pickle."""
    with path.open("wb") as file:  # given a path, numpy would add its ending to the partial file's name
        np.savez(
            file, paths=np.array(list(images.paths)), features=torch.cat(list(chunks)).numpy(), labels=images.labels,
            classes=np.array(images.classes, dtype=str), model=np.array(json.dumps(facts)),
        )  # fmt: skip
