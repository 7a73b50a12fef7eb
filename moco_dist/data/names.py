"""Many names: their hash, and two arrays of them, which processes share (14 million strings are a gigabyte in each)."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**16  # names whose places are looked up at once


def hash_of_list(names: Iterable[str]) -> str:
    """SHA-256 in hex digits of names, in their order; file names may hold any bytes."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


class Names(Sequence[str]):
    """Strings, each made when it is asked for.

    Args:
        content: uint8, the names in UTF-8 with a line feed between.
        ends: (M,) int64, where each of them ends in `content`.
        rows: (N,) int64, those that count, in this order; None: all M.
    """

    def __init__(
        self, content: NDArray[np.uint8], ends: NDArray[np.int64], rows: NDArray[np.int64] | None = None
    ) -> None:
        self._content, self._ends, self._rows = content, ends, rows

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        """These names, in arrays."""
        return cls(*in_arrays(names))

    def __len__(self) -> int:
        return len(self._ends if self._rows is None else self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "Names": ...

    def __getitem__(self, index: Any) -> "str | Names":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = int(index) % len(self) if self._rows is None else int(self._rows[index])
        start = self._ends.item(row - 1) + 1 if row else 0
        return str(self._content.data[start : self._ends.item(row)], "utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        content = self._content.data
        for first in range(0, len(self), CHUNK):
            chunk = np.arange(first, min(first + CHUNK, len(self)))
            rows = chunk if self._rows is None else self._rows[chunk]
            starts = np.where(rows > 0, self._ends[rows - 1] + 1, 0)
            for start, end in zip(starts.tolist(), self._ends[rows].tolist(), strict=True):
                yield str(content[start:end], "utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, rows: NDArray[np.int64]) -> "Names":
        """Some of them, in the order of `rows`."""
        return Names(self._content, self._ends, rows if self._rows is None else self._rows[rows])

    def digest(self) -> str:
        """`hash_of_list` of them."""
        if self._rows is None:
            return hashlib.sha256(self._content.data).hexdigest()
        return hash_of_list(self)


def in_arrays(names: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`content` and `ends` of names."""
    content = "\n".join(names).encode("utf-8", "surrogateescape")
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    if lengths.sum() + max(0, len(names) - 1) < len(content):  # characters of several bytes
        lengths = np.fromiter((len(name.encode("utf-8", "surrogateescape")) for name in names), np.int64, len(names))
    return np.frombuffer(content, np.uint8), np.cumsum(lengths + 1) - 1
