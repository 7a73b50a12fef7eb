"""A packed file at an address: its tables are read at every start, and its images at their places."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moco_dist.config.address import Url
from moco_dist.data.beton import JPEG, Beton, parse_beton
from moco_dist.data.images import ImageFolder, Places
from moco_dist.data.names import hash_of_list
from moco_dist.data.packed import splits_of
from moco_dist.data.remote.index import tell_of_change
from moco_dist.data.remote.store import Object, apart, asked, look_at, read_range
from moco_dist.errors import UserError
from moco_dist.files import write_whole

PART_BYTES = 2**23  # of one request
READ_AT_ONCE = 8  # requests
MOST_BYTES = 2**34  # of a table; more is a damaged header


def remote_packed_splits(root: Url, index_folder: Path | None) -> dict[str, ImageFolder]:
    """The images of a packed file at an address, `train` and `val` where there is one; `root` of each is FILE/SPLIT.

    Args:
        root: the file's address.
        index_folder: where it is noted which version of the file this was; None: it is not.

    Raises:
        UserError: there is none, it is damaged, or has images as pixels.
        InfrastructureError: the store does not answer.
    """
    known, beton = apart(lambda: _tables(root))
    if (beton.mode != JPEG).any():
        raise UserError(f"{root} has images as pixels, which are read from disks alone; pack it without --raw-share")
    if index_folder is not None:
        _note(known, root, index_folder / f"{hash_of_list([root])[:16]}.object")
    size = np.where(beton.size > 0, beton.size, -1)
    splits = {}
    for split, found in splits_of(beton, root).items():
        rows = found.packed_rows
        assert rows is not None
        places = Places(
            [root], [[known.size, known.changed_ns]], np.zeros(len(rows), np.int32), beton.start[rows], size[rows],
            tags=[known.tag],
        )  # fmt: skip
        splits[split] = replace(found, places=places, packed_rows=None)
    return splits


def _note(known: Object, root: Url, path: Path) -> None:
    """Note which version of the file was listed; tell if it is another one than was noted before."""
    now = json.dumps(known)
    with contextlib.suppress(OSError):
        if path.is_file() and path.read_text() == now:
            return
        if path.is_file():
            tell_of_change(root, 1, 1)
        write_whole(path, now.encode())


def _tables(root: Url) -> tuple[Object, Beton]:
    known = asked(lambda: look_at(root), root)
    return known, parse_beton(_Parts(root, known), root)


class _Parts:
    """The bytes of an object, of which those are fetched that are asked for."""

    def __init__(self, url: Url, known: Object) -> None:
        self._url, self._known = url, known

    def __len__(self) -> int:
        return self._known.size

    def __getitem__(self, part: slice, /) -> NDArray[np.uint8]:
        start, end, _ = part.indices(len(self))
        if end - start > MOST_BYTES:
            raise ValueError(f"a table of {end - start:,} bytes")

        def fetch(at: int) -> memoryview:
            return asked(lambda: read_range(self._url, at, min(PART_BYTES, end - at), self._known), self._url)

        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            return np.frombuffer(b"".join(pool.map(fetch, range(start, end, PART_BYTES))), np.uint8)
