"""What the images of a folder measure, found by decoding each of them once, and remembered in FOLDER.

The file is FOLDER/.moco_dist_sizes.npz: paths, bytes, widths and heights, in plain arrays without pickle. It tells
`data verify` what has changed since.
"""

import contextlib
import io
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

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


def read_measured(folder: Path) -> Measured | None:
    """What was written, though images may have come or gone since; None if nothing was written, or it is damaged."""
    try:
        with (folder / NAME).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            measured = Measured(os.fsdecode(arrays["paths"].tobytes()).split(_END), arrays["sizes"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return measured if measured.sizes.shape == (len(measured.paths), len(Size._fields)) else None


def write_measured(folder: Path, sizes: dict[str, Size]) -> None:
    """Remember the sizes of all images of `folder`, by path; where it cannot be written, nothing happens."""
    paths = sorted(sizes)
    np.savez(
        content := io.BytesIO(),
        paths=np.frombuffer(os.fsencode(_END.join(paths)), dtype=np.uint8),
        sizes=np.array([sizes[path] for path in paths], dtype=np.int64),
    )
    with contextlib.suppress(OSError):
        write_whole(folder / NAME, content.getvalue())


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
    with tqdm(total=count, desc=what, unit="images", disable=None) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda chunk: [do(i) for i in chunk], chunks):
            results += done
            bar.update(len(done))
    return results


def _described(size: Size) -> str:
    return f"{size.num_bytes:,} bytes, {size.width} x {size.height} pixels"
