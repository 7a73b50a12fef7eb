"""The index of tar shards at an address: from `moco_dist.idx` beside them, or by reading their headers.

It is kept in a folder of this machine, and believed as long as the store names the same shards, sizes and entity tags.
An index that was made of the same shards on a disk has no tags: there sizes count.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from moco_dist.config.address import Url
from moco_dist.data.images import ImageFolder, Places
from moco_dist.data.names import Names, hash_of_list
from moco_dist.data.processes import made_by_processes
from moco_dist.data.remote.shards import INDEX_NAME, RemoteSet, RemoteShard, find_remote_shards
from moco_dist.data.remote.store import apart, asked, cannot_ask, is_used_here, read_whole
from moco_dist.data.remote.window import WindowFile
from moco_dist.data.tar.headers import ShardImages, read_open_shard
from moco_dist.data.tar.index import index_content, read_index, tar_index
from moco_dist.data.tar.layout import find_shards
from moco_dist.data.tar.listing import CLASS_NAMES, Lists, list_images
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.files import parsed_json, write_whole

VERSION = 1
MOST_READERS = 32  # processes that read headers: they wait for the store


def remote_tar_splits(root: Url, index_folder: Path | None) -> dict[str, ImageFolder]:
    """The images of tar shards at an address: `train`, and `val` where there is one.

    Args:
        root: the data root.
        index_folder: where the index is kept; None: it is not.

    Raises:
        UserError: there are no shards, one is damaged, or there is no training image.
        InfrastructureError: the store does not answer.
    """
    found, lists = _set_and_lists(root, index_folder)
    shards = found.shards
    files = [shard.path for shard in shards]
    facts = [[shard.known.size, shard.known.changed_ns] for shard in shards]
    splits = {}
    for split, listed in lists.splits.items():
        tags = [shard.known.tag for shard in shards]
        places = Places(files, facts, listed.shard, listed.offset, listed.size, tags)
        paths, classes = Names(listed.content, listed.ends), tuple(lists.classes)
        splits[split] = ImageFolder(found.folder, paths, listed.label, classes, places, lists.content_hashes[split])
    return splits


def write_index(root: Path | Url, out: Path) -> int:
    """Write the index of tar shards, to be put beside them in an object store; returns how many images it has.

    Raises:
        UserError: there are no tar shards, or one is damaged.
    """
    if isinstance(root, Url):
        found, lists = _set_and_lists(root, None)
        about = _about(found)
    elif shards := find_shards(root):
        index = tar_index(root, shards, remember=False, elsewhere=None)
        lists, names = index.lists, index.folder / CLASS_NAMES
        rows = [[name, shard.split, facts[0], ""]
                for name, shard, facts in zip(index.shards, shards, index.facts, strict=True)]  # fmt: skip
        about = {"version": VERSION, "shards": rows, "class names": names.stat().st_size if names.is_file() else None}
    else:
        raise UserError(f"{root} has no tar shards, which an index is of")
    write_whole(out, index_content(lists, json.dumps(about)))
    return sum(len(listed.label) for listed in lists.splits.values())


def _set_and_lists(root: Url, index_folder: Path | None) -> tuple[RemoteSet, Lists]:
    found = apart(lambda: find_remote_shards(root))
    place = index_folder and index_folder / f"{hash_of_list([root])[:16]}.tars"
    if place is not None:
        if known := _fitting(place, found):
            return known
        _tell_what_has_changed(place, found)
    if found.index is not None and (known := _downloaded(found, place)):
        return known
    lists = _made(root, found)
    if place is not None:
        with contextlib.suppress(OSError):
            write_whole(place, index_content(lists, json.dumps(_about(found))))
            return _fitting(place, found) or (found, lists)  # mapped, so that what was read to make it can go
    return found, lists


def _about(found: RemoteSet) -> dict[str, Any]:
    skipped = len(found.folder) + 1
    return {
        "version": VERSION,
        "shards": [[shard.path[skipped:], shard.split, shard.known.size, shard.known.tag] for shard in found.shards],
        "class names": found.class_names and found.class_names.size,
    }


def _fitting(path: Path, found: RemoteSet) -> tuple[RemoteSet, Lists] | None:
    """The set in the index's order of shards, and the index; None where that is damaged, or of other shards."""
    known = read_index(path)
    if known is None:
        return None
    try:
        was, now = parsed_json(known[0]), _about(found)
        tags = {name: tag for name, _, _, tag in was["shards"]}
        same = was | {"shards": []} == now | {"shards": []} and sorted(row[:3] for row in was["shards"]) == sorted(
            row[:3] for row in now["shards"]
        )
        if not same or any(tags[name] not in ("", tag) for name, _, _, tag in now["shards"]):
            return None
    except (ValueError, TypeError, KeyError):
        return None
    shard_of = {row[0]: shard for row, shard in zip(now["shards"], found.shards, strict=True)}
    return found._replace(shards=[shard_of[name] for name in tags]), known[1]


def _tell_what_has_changed(path: Path, found: RemoteSet) -> None:
    """Name a shard whose bytes are others than when the index was made: the names in it may be the same as before."""
    known = read_index(path)
    try:
        was = {name: facts for name, _, *facts in parsed_json(known[0])["shards"]} if known else {}
    except (ValueError, TypeError, KeyError):
        return
    now = {name: facts for name, _, *facts in _about(found)["shards"]}
    if changed := [
        name for name, (size, tag) in now.items() if name in was and was[name] not in ([size, tag], [size, ""])
    ]:
        tell_of_change(found.folder / changed[0], len(changed), len(now))


def tell_of_change(url: Url, changed: int, total: int) -> None:
    """That an object, one of `changed` of a set of `total`, is another one than when the run was last started."""
    of = f" ({changed:,} of {total:,} shards have)" if total > 1 else ""
    print(
        f"warning: {url} has changed since this run was last started{of}; its images are listed anew", file=sys.stderr
    )


def _downloaded(found: RemoteSet, place: Path | None) -> tuple[RemoteSet, Lists] | None:
    """The index that lies beside the shards, if it is of them."""
    url = found.folder / INDEX_NAME
    content = apart(lambda: asked(lambda: read_whole(url), url))
    if place is not None:
        with contextlib.suppress(OSError):
            write_whole(place, content)
            if known := _fitting(place, found):
                return known
    else:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / INDEX_NAME).write_bytes(content)
            if known := _fitting(Path(folder) / INDEX_NAME, found):
                splits = {
                    split: listed._replace(**{name: np.array(rows) for name, rows in listed._asdict().items()})
                    for split, listed in known[1].splits.items()
                }
                return known[0], known[1]._replace(splits=splits)
    print(f"warning: {url} is of other shards than lie beside it; their headers are read instead", file=sys.stderr)
    return None


def _made(root: Url, found: RemoteSet) -> Lists:
    shards, images = found.shards, []
    readers = 0 if is_used_here() else min(len(shards), MOST_READERS)
    with Told(f"reading the headers of {root}", len(shards), "shards", World()) as told:
        for of_shard in made_by_processes(lambda i: _read_headers(shards[i]), range(len(shards)), readers, 2):
            images.append(of_shard)
            told.add()
    names: list[str] = []
    if found.class_names is not None:
        url = found.folder / CLASS_NAMES
        names = apart(lambda: asked(lambda: read_whole(url), url)).decode().splitlines()
    return list_images(root, shards, images, names)


def _read_headers(shard: RemoteShard) -> ShardImages:
    try:
        return read_open_shard(shard.path, WindowFile(shard.path, shard.known))  # type: ignore[arg-type]
    except OSError as error:
        raise cannot_ask(shard.path, error) from error
