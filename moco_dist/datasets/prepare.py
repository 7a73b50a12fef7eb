"""Data sets made ready on disk (`moco-dist data prepare`): OUT/train/CLASS/IMAGE and OUT/val/CLASS/IMAGE.

OUT appears at once and complete, or not at all: everything is written to a hidden folder beside it, which is
renamed at the end. OUT/dataset.json says what OUT holds; a second call finds it and does nothing.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from moco_dist.config.address import Url
from moco_dist.data.images import ImageFolder
from moco_dist.data.sources import find_images, find_splits
from moco_dist.datasets import imagenet, published
from moco_dist.datasets.measured import NAME as SIZES
from moco_dist.datasets.measured import (
    Size,
    differences,
    in_threads,
    measure_images,
    read_measured,
    readable,
    write_measured,
)
from moco_dist.datasets.shapes import SHAPES, ShapeSettings, draw_image
from moco_dist.errors import UserError, file_error
from moco_dist.files import parsed_json

MARKER = "dataset.json"
UNREADABLE = "unreadable.txt"
STOPPED = ".stopped.npz"  # ends the name of a file that keeps what was decoded before somebody asked for an end


def prepare_fashion_mnist(out: Path, source: Path | None = None) -> Path:
    """Fashion-MNIST as gray PNGs, from wherever `published.fashion_mnist` finds it.

    Args:
        out: folder to make.
        source: a folder with the four idx files, gzipped, under their published names.

    Returns:
        `out`.

    Raises:
        UserError: no source is at hand, a file is damaged, or `out` holds something else.
    """
    recipe = {"name": "fashion-mnist"}
    if not _is_there(out, recipe):
        with tempfile.TemporaryDirectory() as scratch, _appearing(out, recipe) as partial:
            _write_pngs(partial, published.fashion_mnist(source, Path(scratch)))
    return out


def prepare_cifar10(out: Path) -> Path:
    """CIFAR-10 as colour PNGs, downloaded.

    Returns:
        `out`.

    Raises:
        UserError: the download fails, or `out` holds something else.
    """
    recipe = {"name": "cifar10"}
    if not _is_there(out, recipe):
        with tempfile.TemporaryDirectory() as scratch, _appearing(out, recipe) as partial:
            _write_pngs(partial, published.cifar10(Path(scratch)))
    return out


def prepare_shapes(
    out: Path, seed: int = 0, num_train: int = 8_000, num_val: int = 2_000, settings: ShapeSettings | None = None
) -> Path:
    """The generated set of `moco_dist.datasets.shapes`, as JPEGs: needs nothing but some seconds.

    Args:
        out: folder to make.
        seed: of every image, with its split and number.
        num_train: training images, over all classes.
        num_val: validation images, over all classes.
        settings: what the images look like; default: ShapeSettings().

    Returns:
        `out`.

    Raises:
        UserError: fewer images than classes, or `out` holds something else.
    """
    names, settings = tuple(SHAPES), settings or ShapeSettings()
    if min(num_train, num_val) < len(names):
        raise UserError(f"num_train {num_train} and num_val {num_val} must be at least {len(names)}, one a class")

    def draw(i: int, folder: Path, stream: int) -> None:
        image = draw_image(i % len(names), np.random.default_rng([seed, stream, i]), settings)
        image.save(folder / names[i % len(names)] / f"{i:05d}.jpg", quality=settings.jpeg_quality)

    counts = {"num_train": num_train, "num_val": num_val}
    recipe = {"name": "shapes", "seed": seed, **counts, **dataclasses.asdict(settings)}
    if not _is_there(out, recipe):
        with _appearing(out, recipe) as partial:
            for stream, (split, count) in enumerate({"train": num_train, "val": num_val}.items()):
                _make_class_folders(partial / split, names)
                in_threads(functools.partial(draw, folder=partial / split, stream=stream), count, f"drawing {split}")
    return out


def prepare_imagefolder(out: Path, source: Path) -> Path:
    """Your own images, checked: every file is decoded, and `out` is made of links to those that can be read.

    A run on SOURCE itself would meet a damaged file hours later and end there. OUT/unreadable.txt lists the files
    that were left out, with the reasons. SOURCE stays as it is, and is needed as long as `out` is.

    Args:
        out: folder to make, outside of `source`.
        source: SOURCE/train and SOURCE/val, or one folder of class folders or of images.

    Returns:
        `out`.

    Raises:
        UserError: `source` has no readable images or a layout that does not fit, or `out` holds something else.
    """
    source = source.absolute()
    _require_outside(out, source)
    if source.is_file():
        raise UserError(f"{source} is a file, and links lead into a folder; moco-dist data verify {source} checks it")
    splits = find_splits(source, remember=False)
    if splits["train"].places is not None:
        raise UserError(f"{source} has tar shards, and links lead to files; moco-dist data verify {source} checks them")
    recipe = {
        "name": "imagefolder",
        "source": str(source),
        **{f"{split}_files": len(found.paths) for split, found in splits.items()},
    }
    if _is_there(out, recipe):
        return out
    with _appearing(out, recipe) as partial:
        unreadable = [
            line for split, found in splits.items() for line in _link(found, found.paths, partial / split, out)
        ]
        if unreadable:
            (partial / UNREADABLE).write_text("\n".join(unreadable) + "\n", "utf-8", "surrogateescape")
    return out


def prepare_imagenette(out: Path, source: Path | None = None) -> Path:
    """Imagenette: ten classes of ImageNet, short side 320 pixels, downloaded or from its archive.

    Args:
        out: folder to make.
        source: imagenette2-320.tgz.

    Returns:
        `out`.

    Raises:
        UserError: the download fails, the archive is damaged, or `out` holds something else.
    """
    recipe = {"name": "imagenette"}
    if not _is_there(out, recipe):
        with tempfile.TemporaryDirectory(dir=_parent_of(out)) as scratch, _appearing(out, recipe) as partial:
            folder = published.imagenette(source, Path(scratch))
            for split in ("train", "val"):
                shutil.move(folder / split, partial / split)
    return out


def prepare_imagenet(
    out: Path, source: Path, kind: Literal["tars", "folder"], counts: imagenet.Counts | None = None
) -> Path:
    """ImageNet-1k, checked: every image is decoded, and their number is the published one.

    Unpacking that was interrupted goes on with the next call.

    Args:
        out: folder to make.
        source: the folder of the three archives (`tars`), or one that somebody unpacked, in a layout of `imagenet`
            (`folder`: `out` becomes links to it).
        kind: which of them.
        counts: numbers of classes and images; default: ImageNet-1k's.

    Returns:
        `out`.

    Raises:
        UserError: archives are missing or damaged, numbers differ, images cannot be read, or `out` is something else.
    """
    counts = counts or imagenet.Counts()
    recipe = {"name": "imagenet", "from": kind, "source": str(source.absolute())}
    if _is_there(out, recipe):
        return out
    if kind == "folder":
        return _link_imagenet(out, source, counts, recipe)
    unpacked = out.with_name(f".{out.name}.unpacked")
    imagenet.unpack(source, unpacked, counts)
    problems = []
    for split, found in [("train", find_images(unpacked, "train")), ("val", find_images(unpacked, "val"))]:
        measured = measure_images(found, f"reading {split}", unpacked / f".{split}{STOPPED}")
        bad = {path: problem for path, problem in measured.items() if isinstance(problem, str)}
        for name in {path.partition("/")[0] for path in bad}:  # to be unpacked anew by the next call
            shutil.rmtree(found.root / name if split == "train" else found.root, ignore_errors=True)
        problems += bad.values()
        if not bad:
            write_measured(found.disk_root / SIZES, readable(measured))
    if problems:
        count = f"{len(problems)} image(s) of {source} cannot be read"
        raise UserError("\n".join([*problems[:10], f"{count}; repeat to unpack their classes again"]))
    _finish(unpacked, out, recipe)
    return out


def _link_imagenet(out: Path, source: Path, counts: imagenet.Counts, recipe: dict[str, Any]) -> Path:
    _require_outside(out, source)
    found = imagenet.find_unpacked(source.absolute())
    numbers = (len(found.train.classes), len(found.train.paths), len(found.val.paths))
    if numbers != counts:
        raise UserError(f"{source} has {_of(numbers)}; ImageNet-1k has {_of(counts)}")
    with _appearing(out, recipe) as partial:
        unreadable = [
            *_link(found.train, found.train.paths, partial / "train", out),
            *_link(found.val, found.val_places, partial / "val", out),
        ]
        if unreadable:
            count = f"{len(unreadable)} image(s) of {source} cannot be read"
            raise UserError("\n".join([*unreadable[:10], f"{count}; data prepare imagefolder leaves such images out"]))
        if found.names:
            imagenet.write_names(found.names, partial)
    return out


def verify(root: Path | Url) -> list[str]:
    """Decode every image of a data set, and compare it with what `prepare`, or an earlier `verify`, found.

    The sizes of a folder's split without a problem are remembered, where ROOT can be written to.

    Returns:
        a line for each image that cannot be read, is missing, new or changed, and for each split with another number.

    Raises:
        UserError: there is no data set.
        Preempted: Ctrl-C or SIGTERM; what was decoded is kept, where ROOT can be written to.
    """
    splits = find_splits(root)
    problems: list[str] = []
    for split, found in splits.items():
        sizes = measure_images(found, f"reading {split}", _kept(root, split, found))
        wrong = [problem for problem in sizes.values() if isinstance(problem, str)]
        known = read_measured(found.disk_root / SIZES) if found.places is None else None
        wrong += differences(found.disk_root, known, sizes) if known else []
        if not wrong and found.places is None:  # of tar shards, the index knows whether they have changed
            write_measured(found.disk_root / SIZES, readable(sizes))
        problems += wrong
    if isinstance(root, Path) and (marked := _marked(root)):
        problems += [
            f"{root / split} has {len(splits[split].paths) if split in splits else 0:,} images; {count:,} were prepared"
            for split, count in marked[1].items() if split not in splits or len(splits[split].paths) != count
        ]  # fmt: skip
    if not problems:
        print(f"{root}: {_described({split: len(found.paths) for split, found in splits.items()})}, all can be read")
    return problems


def _kept(root: Path | Url, split: str, found: ImageFolder) -> Path | None:
    """The file for what a `verify` that is stopped has decoded."""
    if isinstance(root, Url):
        return None
    if root.is_file():
        return root.with_name(f".{root.name}.{split}{STOPPED}")
    folder = root if root.is_dir() else found.root  # a pattern's: the folder that its shards lie in
    return Path(folder) / f".{split}{STOPPED}"


def _is_there(out: Path, recipe: dict[str, Any]) -> bool:
    """Whether `out` already holds what `recipe` says, whole.

    Raises:
        UserError: it holds something else.
    """
    if (marked := _marked(out)) is None:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} exists and is not a prepared data set; remove it or choose another folder")
        return False
    holds, images = marked
    recipe = parsed_json(json.dumps(recipe))
    if differing := [f"{key} {holds.get(key)!r}" for key in recipe | holds if holds.get(key) != recipe.get(key)]:
        what = f"as {holds['name']}" if holds.get("name") != recipe["name"] else f"with {', '.join(differing)}"
        raise UserError(f"{out} was prepared {what}; remove it or choose another folder")
    if images != _counts(out):
        raise UserError(
            f"{out} is damaged: it has {_described(_counts(out))} of {_described(images)}; remove it and prepare again"
        )
    print(f"{out} is already there: {recipe['name']}, {_described(images)}")
    return True


def _marked(out: Path) -> tuple[dict[str, Any], dict[str, int]] | None:
    """What `_finish` wrote: the recipe, and how many images each split has; None where it is another's file."""
    try:
        holds = parsed_json((out / MARKER).read_text())
        images = holds.pop("images")
        return (holds, images) if all(isinstance(count, int) for count in images.values()) and holds["name"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def _appearing(out: Path, recipe: dict[str, Any]) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `out` at the end, and is removed if anything goes wrong."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _finish(partial, out, recipe)
    except OSError as error:
        raise file_error(f"cannot prepare {out}: {(error.strerror or str(error)).lower()}", error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _finish(partial: Path, out: Path, recipe: dict[str, Any]) -> None:
    """Say in `partial` what it holds, and let it become `out`."""
    counts = _counts(partial)
    (partial / MARKER).write_text(json.dumps({**recipe, "images": counts}, indent=2) + "\n")
    partial.rename(out)
    left_out = out / UNREADABLE
    note = f"; {len(left_out.read_bytes().splitlines())} unreadable, see {left_out}" if left_out.exists() else ""
    print(f"{out} is ready: {recipe['name']}, {_described(counts)}{note}")


def _require_outside(out: Path, source: Path) -> None:
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies in its source {source}; choose a folder outside")


def _of(counts: tuple[int, int, int]) -> str:
    return f"{counts[0]:,} classes, {counts[1]:,} training and {counts[2]:,} validation images"


def _parent_of(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _counts(root: Path) -> dict[str, int]:
    return {split: len(found.paths) for split, found in find_splits(root).items()}


def _described(counts: dict[str, int]) -> str:
    return " + ".join(f"{count:,} {split}" for split, count in counts.items()) + " images"


def _make_class_folders(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def _write_pngs(root: Path, splits: dict[str, published.Split]) -> None:
    """Write images to ROOT/SPLIT/CLASS/NUMBER.png."""

    def write(i: int, folder: Path, part: published.Split) -> None:
        path = folder / part.classes[part.labels[i]] / f"{i:05d}.png"
        Image.fromarray(part.images[i]).save(path, compress_level=1)

    for split, part in splits.items():
        _make_class_folders(root / split, part.classes)
        in_threads(functools.partial(write, folder=root / split, part=part), len(part.images), f"writing {split}")


def _link(found: ImageFolder, places: Sequence[str], folder: Path, out: Path) -> list[str]:
    """Decode every image; `folder` becomes links to those that can be read, by `places`, in the order of found.paths.

    Returns:
        why the others cannot be read.

    Raises:
        UserError: none can.
        Preempted: Ctrl-C or SIGTERM; what was decoded is kept beside `out`, which `folder` will be in.
    """
    sizes = measure_images(found, f"reading {folder.name}", out.with_name(f".{out.name}.{folder.name}{STOPPED}"))
    unreadable = [problem for problem in sizes.values() if isinstance(problem, str)]
    if len(unreadable) == len(sizes):
        raise UserError(f"none of the {len(sizes)} files in {found.root} can be read; {unreadable[-1]}")
    good = {}
    for (path, size), place in zip(sizes.items(), places, strict=True):
        if isinstance(size, Size):
            link = folder / place
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(found.root / path)
            good[place] = size
    write_measured(folder / SIZES, good)
    return unreadable
