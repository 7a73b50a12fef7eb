"""The index of tar shards: which images there are, their classes, and where they lie. It is made once, and mapped.

The file has a line of JSON (which shards, their sizes and times, the classes) and plain arrays, which all processes of
a host share through its page cache: 14 million images need no memory of their own in any of them. It is believed only
as long as no shard has changed, and lies beside the shards, or where they cannot be written in a folder that is given.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moco_dist.data.images import NO_CLASS
from moco_dist.data.index import MIN_IMAGES, SETTLED_SECONDS
from moco_dist.data.mapped import are_names, are_within, file_of, map_arrays
from moco_dist.data.names import hash_of_list
from moco_dist.data.processes import made_by_processes
from moco_dist.data.tar.headers import read_shard
from moco_dist.data.tar.layout import Shard, common_folder
from moco_dist.data.tar.listing import CLASS_NAMES, Listed, Lists, list_images, read_class_names
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.files import parsed_json, write_whole

NAME = ".moco_dist_tars"
VERSION = 1
SMALL_BYTES = 2**28  # of shards whose headers are read faster than processes are started
MOST_READERS = 32  # processes that read headers: they wait for storage more than they compute


class TarIndex(NamedTuple):
    """What the shards of a data set hold.

    Attributes:
        folder: that the shards lie in, or below.
        shards: their paths, relative to it.
        facts: (number of shards, 2) size in bytes and modification time in ns of each, as they were.
        lists: the images.
    """

    folder: Path
    shards: list[str]
    facts: list[list[int]]
    lists: Lists


def tar_index(root: Path, shards: list[Shard], remember: bool, elsewhere: Path | None) -> TarIndex:
    """The index of `shards`, which `find_shards(root)` has found: as it was remembered, or by reading their headers.

    Args:
        root: the data root.
        shards: the tar files.
        remember: whether an index may be written.
        elsewhere: a folder for it where that of the shards cannot be written; None: it is then not written.

    Raises:
        UserError: of `read_shard` and `list_images`.
    """
    return _known_or_made(root, tuple(shards), asked_of(root, shards), remember, elsewhere)


def asked_of(root: Path, shards: Sequence[Shard]) -> str:
    """What an index of these shards is known by: their names, splits, sizes and times."""
    folder = common_folder(shards)
    asked = {
        "version": VERSION,
        "root": root.name,
        "shards": [[os.path.relpath(shard.path, folder), shard.split, *_facts(shard.path)] for shard in shards],
        "class names": _facts(folder / CLASS_NAMES),
    }
    return json.dumps(asked)


def place_of(root: Path, folder: Path) -> Path:
    """Where the index of shards in `folder` lies, beside them."""
    return folder / f"{NAME}-{hash_of_list([root.name])[:8]}"


@functools.lru_cache(maxsize=1)  # both splits of a set are asked for, one after the other
def _known_or_made(
    root: Path, shards: tuple[Shard, ...], asked: str, remember: bool, elsewhere: Path | None
) -> TarIndex:
    started_ns = time.time_ns()
    folder = common_folder(shards)
    names = [name for name, *_ in parsed_json(asked)["shards"]]
    facts = [row[2:] for row in parsed_json(asked)["shards"]]
    places = [place_of(root, folder)]
    if elsewhere is not None:
        places.append(elsewhere / f"{hash_of_list([str(folder.resolve()), root.name])[:16]}.tars")
    for place in places:
        if (lists := _read(place, asked)) is not None:
            return TarIndex(folder, names, facts, lists)
    made = _made(root, shards, folder, sum(size for size, _ in facts))
    count = sum(len(listed.label) for listed in made.splits.values())
    newest = max(mtime_ns for _, mtime_ns in facts)
    if remember and count >= MIN_IMAGES and newest < started_ns - SETTLED_SECONDS * 10**9:
        for place in places:
            with contextlib.suppress(OSError):
                write_whole(place, index_content(made, asked))
                made = _read(place, asked) or made  # mapped, so that what was read to make it can go
                break
    return TarIndex(folder, names, facts, made)


def _made(root: Path, shards: Sequence[Shard], folder: Path, num_bytes: int) -> Lists:
    readers = min(len(shards), MOST_READERS, max(8, os.cpu_count() or 1)) if num_bytes > SMALL_BYTES else 0
    found = []
    with Told(f"reading the headers of {root}", len(shards), "shards", World()) as told:
        for images in made_by_processes(lambda i: read_shard(shards[i].path), range(len(shards)), readers, 2):
            found.append(images)
            told.add()
    return list_images(root, shards, found, read_class_names(folder))


def _facts(path: Path) -> list[int]:
    """Size and modification time; nothing where there is no such file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    return [status.st_size, status.st_mtime_ns]


def index_content(lists: Lists, asked: str) -> list[bytes | memoryview]:
    """The content of an index, in parts; `asked` is a text by which it is later known what `lists` is of."""
    arrays = {
        f"{split}.{name}": array for split, part in lists.splits.items() for name, array in part._asdict().items()
    }
    return file_of({"asked": asked, "lists": lists._replace(splits={})._asdict()}, arrays)


def _read(path: Path, asked: str) -> Lists | None:
    """What was written to `path`; None where nothing was, it is damaged, or of other shards than `asked` tells of."""
    known = read_index(path)
    return known[1] if known is not None and known[0] == asked else None


def read_index(path: Path) -> tuple[str, Lists] | None:
    """What `index_content` was given; None where there is no such file, or it is damaged."""
    try:
        facts, arrays = map_arrays(path)
        columns: dict[str, dict[str, NDArray[Any]]] = {}
        for name, array in arrays.items():
            split, _, column = name.partition(".")
            columns.setdefault(split, {})[column] = array
        lists = Lists(**{**facts["lists"], "splits": {split: Listed(**own) for split, own in columns.items()}})
        return (facts["asked"], lists) if _is_sound(lists, len(parsed_json(facts["asked"])["shards"])) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_sound(lists: Lists, num_shards: int) -> bool:
    """Whether every number of an image is one that there can be; where it lies is seen when it is read."""
    return (
        "train" in lists.splits
        and lists.content_hashes.keys() == lists.splits.keys()
        and all(isinstance(name, str) for name in lists.classes)
        and all(
            len(set(map(len, listed[1:]))) == 1
            and are_names(listed.content, listed.ends)
            and are_within(listed.shard, 0, num_shards)
            and listed.offset.dtype == listed.size.dtype == np.int64
            and are_within(listed.label, NO_CLASS, len(lists.classes))
            for listed in lists.splits.values()
        )
    )
