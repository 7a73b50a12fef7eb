"""Arrays in a file that processes map instead of each reading it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        ValueError, KeyError, TypeError: it is damaged, or another file.
    """
    with path.open("rb") as file:
        if file.readline(len(MAGIC)) != MAGIC:
            raise ValueError("not a file of arrays")
        facts = json.loads(file.readline())
        at = file.tell()
    arrays = {}
    for name, (dtype, length) in facts.pop("arrays").items():
        at += -at % _ALIGNED
        arrays[name] = _map(path, dtype, at, length)
        at += arrays[name].nbytes
    if at != path.stat().st_size:
        raise ValueError("it is incomplete")
    return facts, arrays


def _map(path: Path, dtype: str, at: int, length: int) -> MappedArray:
    if not length:
        return np.zeros(0, dtype).view(MappedArray)
    array = np.memmap(path, dtype, "r", at, (length,)).view(MappedArray)
    array.place = (path, dtype, at, length)
    return array
