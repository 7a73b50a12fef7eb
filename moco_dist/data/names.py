"""Many names: their hash, and two arrays of them, which processes share (14 million strings are a gigabyte in each)."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**16  # names whose places are looked up at once
SHORT, LONGEST = 24, 256  # bytes that folders' names usually have at most, with the slash; that they can have


def hash_of_list(names: Iterable[str]) -> str:
    """SHA-256 in hex digits of names, in their order; file names may hold any bytes."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


class Names(Sequence[str]):
    """Strings, each made when it is asked for.

    Args:
        content: uint8, the names in UTF-8 with a line feed between.
        ends: (M,) int64, where each of them ends in `content`.
        rows: (N,) int64, those that count, in this order; None: all M.
        starts: (M,) int64, where each begins, if there is no line feed between them.
    """

    def __init__(
        self,
        content: NDArray[np.uint8],
        ends: NDArray[np.int64],
        rows: NDArray[np.int64] | None = None,
        starts: NDArray[np.int64] | None = None,
    ) -> None:
        self._content, self._ends, self._rows, self._starts = content, ends, rows, starts

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
        before = self._ends.item(row - 1) + 1 if row else 0
        start = before if self._starts is None else self._starts.item(row)
        return str(self._content.data[start : self._ends.item(row)], "utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        content = self._content.data
        for starts, ends in self._places():
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                yield str(content[start:end], "utf-8", "surrogateescape")

    def _places(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Where names begin and end in the content, CHUNK of them at a time."""
        for first in range(0, len(self), CHUNK):
            chunk = np.arange(first, min(first + CHUNK, len(self)))
            rows = chunk if self._rows is None else self._rows[chunk]
            starts = np.where(rows > 0, self._ends[rows - 1] + 1, 0) if self._starts is None else self._starts[rows]
            yield starts, self._ends[rows]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, rows: NDArray[np.int64]) -> "Names":
        """Some of them, in the order of `rows`."""
        return Names(self._content, self._ends, rows if self._rows is None else self._rows[rows], self._starts)

    def first_folders(self) -> tuple[NDArray[np.int64], list[str]]:
        """The folder that each name begins with, (N,) indices into the second; -1: none. Those in order of appearance.

        It is looked for in so many bytes as a folder's name may have.
        """
        found = np.empty(len(self), np.int64)
        known: dict[bytes, int] = {}
        first = 0
        for starts, ends in self._places():
            part = found[first : first + len(starts)]
            short = _before_slash(self._content, starts, ends, SHORT)
            texts = short if (short != b"").all() else _before_slash(self._content, starts, ends, LONGEST)
            heads = np.flatnonzero(np.append(True, texts[1:] != texts[:-1]))
            numbers = [known.setdefault(text, len(known)) if text else -1 for text in texts[heads].tolist()]
            part[:] = np.repeat(numbers, np.diff(np.append(heads, len(texts))))
            first += len(starts)
        return found, [text.decode("utf-8", "surrogateescape") for text in known]

    def below(self, depths: NDArray[np.int64]) -> "Names":
        """The names without their first bytes, (N,) so many of each."""
        starts, ends = (np.concatenate(parts) for parts in zip(*self._places(), strict=True))
        return Names(self._content, ends, None, starts + depths)

    def digest(self) -> str:
        """`hash_of_list` of them."""
        if self._rows is None and self._starts is None:
            return hashlib.sha256(self._content.data).hexdigest()
        return hash_of_list(self)


def _before_slash(
    content: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64], most: int
) -> NDArray[np.bytes_]:
    """What stands before the first slash of each of these parts, if that is among so many bytes; else b""."""
    if not len(content):
        return np.zeros(len(starts), "S1")
    width = int(min(most, len(content), (ends - starts).max(initial=1)))
    last = len(content) - width
    letters = np.lib.stride_tricks.sliding_window_view(content, width)[np.minimum(starts, last)]
    for row in np.flatnonzero(starts > last):  # too near to the end of the content
        rest = content[starts[row] :]
        letters[row], letters[row, : len(rest)] = 0, rest
    is_slash = letters == ord("/")
    at = is_slash.argmax(axis=1)
    at[~is_slash.any(axis=1) | (starts + at >= ends)] = 0
    letters[np.arange(width) >= at[:, None]] = 0
    return letters.view(f"S{width}")[:, 0]


def in_arrays(names: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`content` and `ends` of names."""
    content = "\n".join(names).encode("utf-8", "surrogateescape")
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    if lengths.sum() + max(0, len(names) - 1) < len(content):  # characters of several bytes
        lengths = np.fromiter((len(name.encode("utf-8", "surrogateescape")) for name in names), np.int64, len(names))
    return np.frombuffer(content, np.uint8), np.cumsum(lengths + 1) - 1
