"""Which images lie below a folder, found once: a file remembers it as long as the folder stays as it is.

Listing 1.28 million files takes minutes where the file system is on a network. The index lies in FOLDER: a line of JSON
with the modification time of every folder below, which changes when a file comes or goes, and plain arrays, which all
processes of a host map. FOLDER itself is listed anew. The index is written for large folders alone, and never believed
where anything differs. If FOLDER cannot be written, it lies in a folder that the caller gives: a run's.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moco_dist.data.images import NO_CLASS, hash_of_contents
from moco_dist.data.layout import is_image, is_left_out
from moco_dist.data.mapped import are_names, are_within, file_of, map_arrays
from moco_dist.data.names import Names, hash_of_list, in_arrays
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.files import write_whole

NAME = ".moco_dist_index"
VERSION = 2
MIN_IMAGES = 10_000  # below it, listing takes less than a second
SETTLED_SECONDS = 2  # a folder that changed so recently may change again and keep its modification time


class Indexed(NamedTuple):
    """All visible images below a folder.

    Attributes:
        paths: N, relative to the folder, with `/`, sorted.
        labels: (N,) int64, index of the first folder of each among the classes; NO_CLASS for one in no folder.
        content_hash: `ImageFolder.content_hash`; "" where no index has it.
    """

    paths: Names
    labels: NDArray[np.int64]
    content_hash: str


def indexed_images(
    folder: Path, classes: Sequence[str], remember: bool = True, elsewhere: Path | None = None
) -> Indexed:
    """The images below `folder`, from the index where it is right.

    Args:
        folder: what to list.
        classes: names of folders in it, all that hold images, in the order of their labels.
        remember: whether to write an index.
        elsewhere: a folder for the index of a `folder` that cannot be written; None: such a one has no index.
    """
    started_ns = time.time_ns()
    top = sorted(entry.name for entry in os.scandir(folder) if not is_left_out(entry.name))
    asked = {"version": VERSION, "top": top, "classes": list(classes)}
    indices = [folder / NAME]
    if elsewhere is not None:
        indices.append(elsewhere / f"{hash_of_list([str(folder.resolve())])[:16]}.folder")
    for index in indices:
        if (known := _read(index, folder, asked)) is not None:
            return known
    folders: dict[str, int] = {}
    with Told(f"listing {folder}", None, "images", World()) as told:
        paths = sorted(_scan(folder, "", folders, told))
    label_of = {name: label for label, name in enumerate(classes)}
    firsts = (path.partition("/") for path in paths)
    labels = np.fromiter((label_of[first] if below else NO_CLASS for first, below, _ in firsts), np.int64, len(paths))
    newest = max(folders.values(), default=0)
    if remember and len(paths) >= MIN_IMAGES and newest < started_ns - SETTLED_SECONDS * 10**9:
        content, ends = in_arrays(paths)
        parts = file_of(
            {**asked, "folders": folders, "content_hash": hash_of_contents(paths, labels)},
            {"content": content, "ends": ends, "labels": labels},
        )
        for index in indices:  # where none can be written, the folder is listed every time
            with contextlib.suppress(OSError):
                write_whole(index, parts)
                if (known := _read(index, folder, asked)) is not None:
                    return known  # mapped, so that what was read to make it can go
                break
    return Indexed(Names.of(paths), labels, "")


def _scan(folder: Path, prefix: str, folders: dict[str, int], told: Told) -> list[str]:
    """Paths of all images below; an image is known by its name, without asking the file system for it.

    Fills `folders` with the modification times of the folders below, taken before they are listed.

    Raises:
        UserError: a link leads back to a folder above it.
    """
    found, below = list[str](), list[str]()
    if prefix:
        folders[prefix] = _mtime_ns(f"{folder}/{prefix}")
    with os.scandir(folder / prefix) as entries:
        for entry in entries:
            if is_left_out(entry.name):
                continue
            if is_image(entry.name):
                found.append(prefix + entry.name)
            elif entry.is_dir():
                target = Path(entry).resolve() if entry.is_symlink() else None
                if target and (folder / prefix).resolve().is_relative_to(target):
                    raise UserError(f"{entry.path} is a link to {target}, which it lies in; remove it")
                below += _scan(folder, f"{prefix}{entry.name}/", folders, told)
    told.add(len(found))
    return found + below


def _mtime_ns(path: str) -> int:
    """A folder's, of a path as text: of 20,000 classes, a Path each takes longer than asking the system."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1  # gone: no folder had this time


def _read(index: Path, folder: Path, asked: dict[str, Any]) -> Indexed | None:
    """What an index has; None where there is none, it is damaged or of another version, or the folder has changed."""
    try:
        facts, arrays = map_arrays(index)
        is_right = asked == {name: facts[name] for name in asked} and all(
            _mtime_ns(f"{folder}/{name}") == mtime_ns for name, mtime_ns in facts["folders"].items()
        )
        is_sound = are_names(arrays["content"], arrays["ends"]) and are_within(
            arrays["labels"], NO_CLASS, len(asked["classes"])
        )
        if not is_right or not is_sound or len(arrays["ends"]) != len(arrays["labels"]):
            return None
        return Indexed(Names(arrays["content"], arrays["ends"]), arrays["labels"], facts["content_hash"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
