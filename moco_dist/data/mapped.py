"""Arrays in a file that processes map instead of each reading it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moco_dist.files import parsed_json

MAGIC = b"moco_dist arrays 1\n"
_ALIGNED = 64  # bytes


class MappedArray(np.ndarray):
    """An array in a file. Another process that it is sent to maps the file; what is computed of it is a plain array."""

    place: tuple[Path, str, int, int] | None = None  # file, dtype, first byte, length

    def __array_finalize__(self, parent: Any) -> None:
        """A view or a copy is at no known place."""
        self.place = None

    def __reduce__(self) -> Any:
        """For another process: the place, where it is known."""
        return (_map, self.place) if self.place else np.asarray(self).__reduce__()


def file_of(facts: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> list[bytes | memoryview]:
    """The content of a file, in parts, that `map_arrays` reads: `facts` are plain JSON values, arrays have one axis."""
    header = {**facts, "arrays": {name: [array.dtype.str, len(array)] for name, array in arrays.items()}}
    text = MAGIC + json.dumps(header).encode() + b"\n"
    parts: list[bytes | memoryview] = [text]
    at = len(text)
    for array in arrays.values():
        padding = -at % _ALIGNED
        parts += [b"\0" * padding, np.ascontiguousarray(array).data.cast("B")]
        at += padding + array.nbytes
    return parts


def map_arrays(path: Path) -> tuple[dict[str, Any], dict[str, MappedArray]]:
    """Facts and arrays of a file that `file_of` made.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError, TypeError, AttributeError: it is damaged, or another file.
    """
    with path.open("rb") as file:
        if file.readline(len(MAGIC)) != MAGIC:
            raise ValueError("not a file of arrays")
        facts = parsed_json(file.readline())
        at = file.tell()
    arrays = {}
    for name, (dtype, length) in facts.pop("arrays").items():
        at += -at % _ALIGNED
        arrays[name] = _map(path, dtype, at, length)
        at += arrays[name].nbytes
    if at != path.stat().st_size:
        raise ValueError("it is incomplete")
    return facts, arrays


def are_within(array: NDArray[Any], low: int, end: int) -> bool:
    """Whether an array of a file that others may have made has integers from `low` to `end` - 1 and nothing else."""
    return array.dtype.kind == "i" and (not len(array) or bool(low <= array.min() and array.max() < end))


def are_names(content: NDArray[Any], ends: NDArray[Any]) -> bool:
    """The same of the arrays of `Names`: each ends in `content`, after the one before it."""
    return content.dtype == np.uint8 and are_within(ends, 0, len(content) + 1) and bool((ends[1:] > ends[:-1]).all())


def _map(path: Path, dtype: str, at: int, length: int) -> MappedArray:
    if not length:
        return np.zeros(0, dtype).view(MappedArray)
    if not 0 < length * np.dtype(dtype).itemsize <= path.stat().st_size - at:
        raise ValueError("it is incomplete")
    array = np.memmap(path, dtype, "r", at, (length,)).view(MappedArray)
    array.place = (path, dtype, at, length)
    return array
