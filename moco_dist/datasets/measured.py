"""What the images of a folder measure, found by decoding each of them once, and remembered in FOLDER.

The file is FOLDER/.moco_dist_sizes.npz: paths, bytes, widths and heights, in plain arrays without pickle. It tells
`data verify` what has changed since. A file of the same kind keeps what was decoded by a command that was stopped.
"""

import contextlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moco_dist.data.images import ImageError, ImageFolder
from moco_dist.data.sources import image_reader
from moco_dist.data.storage import raise_if_storage_failed
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import Preempted
from moco_dist.files import write_whole

T = TypeVar("T")

NAME = ".moco_dist_sizes.npz"
CHUNK = 64  # images a thread takes at a time; an interrupt waits for them
_END = "\0"  # the one character that no path has


class Size(NamedTuple):
    """One image: length of its file in bytes, width and height in pixels."""

    num_bytes: int
    width: int
    height: int


class Measured(NamedTuple):
    """All images of a folder.

    Attributes:
        paths: N relative paths, sorted.
        sizes: (N, 3) int64, the columns of `Size`.
    """

    paths: list[str]
    sizes: NDArray[np.int64]


def read_measured(path: Path) -> Measured | None:
    """What was written, though images may have come or gone since; None if nothing was written, or it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            measured = Measured(os.fsdecode(arrays["paths"].tobytes()).split(_END), arrays["sizes"])
    except Exception:  # on a damaged or crafted file numpy, zipfile and zlib raise anything
        return None
    return measured if measured.sizes.shape == (len(measured.paths), len(Size._fields)) else None


def write_measured(path: Path, sizes: dict[str, Size]) -> None:
    """Remember sizes of images, by path; where the file cannot be written, nothing happens."""
    names = sorted(sizes)
    np.savez(
        content := io.BytesIO(),
        paths=np.frombuffer(os.fsencode(_END.join(names)), dtype=np.uint8),
        sizes=np.array([sizes[name] for name in names], dtype=np.int64),
    )
    with contextlib.suppress(OSError):
        write_whole(path, content.getvalue())


def differences(folder: Path, measured: Measured, now: dict[str, Size | str]) -> list[str]:
    """A line for each image that is missing, new or changed since `measured`; `now` has sizes, or why there is none."""
    known = set(measured.paths)
    lines = [f"{folder / path} is missing" for path in measured.paths if path not in now]
    lines += [f"{folder / path} is new" for path in now if path not in known]
    for path, values in zip(measured.paths, measured.sizes.tolist(), strict=True):
        was, size = Size(*values), now.get(path)
        if isinstance(size, Size) and size != was:
            lines.append(f"{folder / path} has changed: {_described(was)} before, {_described(size)} now")
    return lines


def in_threads(do: Callable[[int], T], count: int, what: str) -> list[T]:
    """do(0) .. do(count - 1) on all cores, in order; reading and writing images lets other threads run."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    results: list[T] = []
    with Told(what, count, "images", World()) as told, ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda chunk: [do(i) for i in chunk], chunks):
            results += done
            told.add(len(done))
    return results


def measure_images(found: ImageFolder, what: str, kept: Path | None) -> dict[str, Size | str]:
    """The size of every image, by path, decoded on all cores; the reason where it cannot be decoded.

    Args:
        found: the images.
        what: the work, as a person is told of it.
        kept: a file for what was decoded when somebody asked for an end. It goes when all are. None: nothing is kept.

    Raises:
        Preempted: Ctrl-C or SIGTERM, and `kept` is written.
    """
    read, before = image_reader(found), _decoded_before(found, kept) if kept else {}
    left = [i for i, path in enumerate(found.paths) if path not in before]
    now: dict[str, Size | str] = {}

    def measure(i: int) -> None:
        now[found.paths[i]] = size_of(i)

    def size_of(i: int) -> Size | str:
        try:
            num_bytes, image = read(i)
        except ImageError as error:
            raise_if_storage_failed(error)
            return str(error)
        return Size(num_bytes, image.width, image.height)

    try:
        in_threads(lambda number: measure(left[number]), len(left), what)
    except KeyboardInterrupt:
        if kept is None:
            raise
        write_measured(kept, done := before | readable(now))
        if read_measured(kept) is None:  # a read-only folder
            raise
        raise Preempted(f"{len(done):,} of {len(found.paths):,} images are decoded ({what})") from None
    if kept is not None:
        kept.unlink(missing_ok=True)
    return {path: before[path] if path in before else now[path] for path in found.paths}


def _decoded_before(found: ImageFolder, kept: Path) -> dict[str, Size]:
    """What a command that was stopped has decoded of images that are as they were then."""
    measured = read_measured(kept)
    if measured is None:
        return {}
    when = kept.stat().st_mtime_ns
    shards_changed_ns = None if found.places is None else max(mtime_ns for _, mtime_ns in found.places.facts)
    root = found.root
    assert isinstance(root, Path)
    packed = root.parent if root.parent.is_file() else None

    def is_as_then(path: str, size: Size) -> bool:
        if shards_changed_ns is not None:
            return shards_changed_ns < when
        try:
            facts = (packed or root / path).stat()
        except OSError:
            return False
        return facts.st_mtime_ns < when and (packed is not None or facts.st_size == size.num_bytes)

    sizes = {path: Size(*row) for path, row in zip(measured.paths, measured.sizes.tolist(), strict=True)}
    there = set(found.paths)
    return {path: size for path, size in sizes.items() if path in there and is_as_then(path, size)}


def readable(sizes: dict[str, Size | str]) -> dict[str, Size]:
    """Those that are sizes, and no reasons why there is none."""
    return {path: size for path, size in sizes.items() if isinstance(size, Size)}


def _described(size: Size) -> str:
    return f"{size.num_bytes:,} bytes, {size.width} x {size.height} pixels"
