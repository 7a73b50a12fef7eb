"""Which images lie below a folder, found once: a file remembers it as long as the folder stays as it is.

Listing 1.28 million files takes minutes where the file system is on a network. The index is FOLDER's neighbour in JSON,
with the modification time of every folder below, which changes when a file comes or goes; FOLDER itself is listed anew.
It is written for large folders alone, and never believed where anything differs. If FOLDER cannot be written, it lies
in a folder that the caller gives: a run's.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from moco_dist.data.layout import is_image, is_left_out
from moco_dist.data.names import hash_of_list
from moco_dist.errors import UserError
from moco_dist.files import write_whole

NAME = ".moco_dist_index.json"
MIN_IMAGES = 10_000  # below it, listing takes less than a second
SETTLED_SECONDS = 2  # a folder that changed so recently may change again and keep its modification time


def image_paths(folder: Path, remember: bool = True, elsewhere: Path | None = None) -> list[str]:
    """Sorted relative paths, with `/`, of all visible images below `folder`, from the index where it is right.

    Args:
        folder: what to list.
        remember: whether to write an index.
        elsewhere: a folder for the index of a `folder` that cannot be written; None: such a one has no index.
    """
    started_ns = time.time_ns()
    top = sorted(entry.name for entry in os.scandir(folder) if not is_left_out(entry.name))
    indices = [folder / NAME]
    if elsewhere is not None:
        indices.append(elsewhere / f"{hash_of_list([str(folder.resolve())])[:16]}.json")
    for known in map(_read, indices):
        if (
            known is not None
            and known["top"] == top
            and all(_mtime_ns(folder / name) == mtime for name, mtime in known["folders"].items())
        ):
            return known["paths"]
    folders: dict[str, int] = {}
    paths = sorted(_scan(folder, "", folders))
    newest = max(folders.values(), default=0)
    if remember and len(paths) >= MIN_IMAGES and newest < started_ns - SETTLED_SECONDS * 10**9:
        _write(indices, {"top": top, "folders": folders, "paths": paths})
    return paths


def _scan(folder: Path, prefix: str, folders: dict[str, int]) -> list[str]:
    """Paths of all images below; an image is known by its name, without asking the file system for it.

    Fills `folders` with the modification times of the folders below, taken before they are listed.

    Raises:
        UserError: a link leads back to a folder above it.
    """
    found: list[str] = []
    if prefix:
        folders[prefix] = _mtime_ns(folder / prefix)
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
                found += _scan(folder, f"{prefix}{entry.name}/", folders)
    return found


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1  # gone: no folder had this time


def _read(index: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(index.read_bytes())
        is_ours = {"top", "folders", "paths"} <= known.keys()
        # An index of an earlier version may list folders that are left out now.
        return known if is_ours and not any(is_left_out(Path(name).name) for name in known["folders"]) else None
    except (OSError, ValueError, AttributeError):
        return None


def _write(indices: list[Path], known: dict[str, Any]) -> None:
    """Write the first of them that can be written; where none can, the folder is listed every time."""
    content = json.dumps(known).encode()
    for index in indices:
        with contextlib.suppress(OSError):
            return write_whole(index, content)
