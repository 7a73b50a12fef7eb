"""From the members of tar shards to a list of images with classes, in the order of a folder of them.

An image's class is what its .cls or .json says, or where no image of the set has one, the first folder on its way. The
list is sorted by class and name, as a folder's: however the shards were cut or shuffled, a run goes over the same list.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moco_dist.config.address import Url
from moco_dist.data.images import NO_CLASS, hash_of_contents
from moco_dist.data.layout import IMAGE_SUFFIXES, require_distinct
from moco_dist.data.names import in_arrays
from moco_dist.data.tar.headers import Label, ShardImages
from moco_dist.data.tar.layout import SPLIT_FOLDERS, AnyShard
from moco_dist.errors import UserError, nearest

CLASS_NAMES = "classes.txt"  # beside the shards: line n has the name of the class of number n
COPIED_SHARE = 0.01  # of a shard's images that are another's too, name and size, for it to be a copy


class Listed(NamedTuple):
    """The images of one split, sorted by path.

    Attributes:
        content, ends: the paths, CLASS/NAME, as `Names` has them.
        shard: (N,) int32, number of the shard.
        offset, size: (N,) int64, where the image lies in it.
        label: (N,) int64, index into the classes, or NO_CLASS.
    """

    content: NDArray[np.uint8]
    ends: NDArray[np.int64]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]


class Lists(NamedTuple):
    """A data set's images.

    Attributes:
        classes: sorted names.
        splits: `train`, and `val` where there is one.
        content_hashes: `ImageFolder.content_hash` of each.
    """

    classes: list[str]
    splits: dict[str, Listed]
    content_hashes: dict[str, str]


def read_class_names(folder: Path) -> list[str]:
    """The lines of `classes.txt` beside the shards; none where there is no such file."""
    try:
        return (folder / CLASS_NAMES).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / CLASS_NAMES} cannot be read: {error}") from error


def list_images(
    root: Path | Url, shards: Sequence[AnyShard], found: list[ShardImages], class_names: list[str]
) -> Lists:
    """The images of all shards, by split.

    Args:
        root: the data root.
        shards: the tar files.
        found: what `read_shard` has found in each.
        class_names: by number, or empty.

    Raises:
        UserError: there is no training image; a class is missing, or known by number and by name; a shard is a copy.
    """
    names = [name for images in found for name in images.names]
    labels = [label for images in found for label in images.labels]
    counts = [len(images.names) for images in found]
    shard_of = np.repeat(np.arange(len(found), dtype=np.int32), counts)
    offset = np.concatenate([np.zeros(0, np.int64), *(images.offset for images in found)])
    size = np.concatenate([np.zeros(0, np.int64), *(images.size for images in found)])
    if not names:
        raise UserError(f"no image found in {root}; members called {', '.join(IMAGE_SUFFIXES)} count as images")
    names, said = _without_splits(names, root)
    splits = _splits(names, said, shards, shard_of)
    _require_one_kind(labels, names)
    classes_of, paths = _classes(names, labels, class_names, root)
    del names, labels

    rows_of = {split: np.flatnonzero(splits == split) for split in ("train", "val")}
    if not len(rows_of["train"]):
        raise UserError(f"{root} has no training images: all of its shards, or of their folders, are called val")
    classes = sorted({classes_of[row] for row in rows_of["train"]} - {""})
    require_distinct(root, classes)
    label_of = {"": NO_CLASS, **{name: label for label, name in enumerate(classes)}}
    listed, content_hashes = {}, {}
    for split, rows in rows_of.items():
        if not len(rows):
            continue
        for row in rows:
            if (name := classes_of[row]) not in label_of:
                raise UserError(
                    f"{paths[row]}: validation has a class {name} that training lacks{nearest(name, classes)}"
                )
        own = [paths[row] for row in rows]
        _make_distinct(own, size[rows], shard_of[rows], shards)
        order = np.array(sorted(range(len(own)), key=own.__getitem__))
        own, rows = [own[i] for i in order], rows[order]
        label = np.fromiter((label_of[classes_of[row]] for row in rows), np.int64, len(rows))
        listed[split] = Listed(*in_arrays(own), shard_of[rows], offset[rows], size[rows], label)
        content_hashes[split] = hash_of_contents(own, label)
    return Lists(classes, listed, content_hashes)


def _without_splits(names: list[str], root: Path | Url) -> tuple[list[str], list[str] | None]:
    """The names without the folders that are no class: train and val, what lies above them, or one called as the file.

    Returns:
        the names, and what split their folders are of; None where they are of none.
    """
    folders = names[0].split("/")[:-1]
    depth = next((i for i, folder in enumerate(folders) if folder in SPLIT_FOLDERS), None)
    if depth is not None:
        above = "".join(f"{folder}/" for folder in folders[:depth])
        parts = [name.removeprefix(above).partition("/") for name in names if name.startswith(above)]
        if len(parts) == len(names) and all(slash and folder in SPLIT_FOLDERS for folder, slash, _ in parts):
            return [rest for _, _, rest in parts], [SPLIT_FOLDERS[folder] for folder, _, _ in parts]
    if all(name.startswith(f"{root.stem}/") for name in names):
        return [name.partition("/")[2] for name in names], None
    return names, None


def _splits(
    names: list[str], said: list[str] | None, shards: Sequence[AnyShard], shard_of: NDArray[np.int32]
) -> NDArray[np.str_]:
    """(N,) train or val, by the shard's name, else by the member's folder; else train."""
    by_shard = np.array([shards[number].split for number in shard_of.tolist()])
    by_folder = np.array(said if said is not None else [""]).repeat(1 if said is not None else len(names))
    conflict = np.flatnonzero((by_shard != "") & (by_folder != "") & (by_shard != by_folder))
    if len(conflict):
        row = int(conflict[0])
        raise UserError(
            f"{shards[int(shard_of[row])].path} is called {by_shard[row]} and has images in a folder {by_folder[row]} "
            f"({names[row]}); rename the shard"
        )
    split = np.where(by_shard != "", by_shard, by_folder)
    return np.where(split != "", split, "train")


def _require_one_kind(labels: list[Label], names: list[str]) -> None:
    examples = {type(label): row for row, label in enumerate(labels) if label is not None}
    if len(examples) == 2:
        of_number, of_name = examples[int], examples[str]
        raise UserError(
            f"the label of {names[of_number]} is the number {labels[of_number]}, and that of {names[of_name]} the name "
            f"{labels[of_name]!r}; a data set's are all numbers or all names"
        )


def _classes(
    names: list[str], labels: list[Label], class_names: list[str], root: Path | Url
) -> tuple[list[str], list[str]]:
    """Each image's class, "" for none, and its path, CLASS/NAME."""
    if all(label is None for label in labels):
        return [name.partition("/")[0] if "/" in name else "" for name in names], names
    width = max(len(str(label)) for label in labels if label is not None)
    classes, paths = [], []
    for name, label in zip(names, labels, strict=True):
        if isinstance(label, int) and class_names:
            if label >= len(class_names):
                raise UserError(
                    f"{name} in {root} is of class number {label}, and {CLASS_NAMES} names 0 to {len(class_names) - 1}"
                )
            label = class_names[label]
        text = "" if label is None else f"{label:0{width}d}" if isinstance(label, int) else label.replace("/", "_")
        classes.append(text)
        if not text:
            paths.append(name.replace("/", "_"))
        else:
            paths.append(name if name.startswith(f"{text}/") else f"{text}/{name}")
    return classes, paths


def _make_distinct(
    paths: list[str], size: NDArray[np.int64], shard_of: NDArray[np.int32], shards: Sequence[AnyShard]
) -> None:
    """Put the shard's name into paths that two shards have, as where each counts its samples from 0.

    Raises:
        UserError: one is a copy of another.
    """
    if len(set(paths)) == len(paths):
        return
    counted = Counter(paths)
    twice = [row for row, path in enumerate(paths) if counted[path] > 1]
    first: dict[tuple[str, int], int] = {}
    copied: Counter[tuple[int, int]] = Counter()
    for row in twice:
        twin = first.setdefault((paths[row], int(size[row])), row)
        if twin != row:
            copied[int(shard_of[twin]), int(shard_of[row])] += 1
    images = np.bincount(shard_of, minlength=len(shards))
    for (one, other), count in copied.items():
        if count > COPIED_SHARE * images[other]:
            raise UserError(
                f"{shards[one].path} and {shards[other].path} have {count:,} images of the same names and sizes; "
                "one is a copy of the other, or of a part: move it away"
            )
    for row in twice:
        stem = PurePosixPath(shards[shard_of[row]].path).stem
        folder, slash, name = paths[row].partition("/")
        paths[row] = f"{folder}/{stem}/{name}" if slash else f"{stem}_{folder}"
