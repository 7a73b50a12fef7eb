"""A packed file that is not finished: what a `data pack` that was stopped has written, for the next one to go on.

OUT is written as the hidden file .OUT.partial. Beside it lies the journal .OUT.partial.jsonl, lines of JSON: first what
is packed and how, then a line for each chunk of images in the file. A line is written after its images are on the disk,
so a kill or a power cut costs what came after the last line and nothing else.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moco_dist.errors import InfrastructureError, InUseError
from moco_dist.files import LineFile, parsed_json

KEEP_EVERY_BYTES = 256 * 2**20  # of images, between two times that they are put on the disk and into the journal


class Chunk(NamedTuple):
    """A line of the journal: neighbouring images of one split.

    Attributes:
        facts: digest of what their files were like before they were read; "" where the recipe says that.
        stored: of each image in the file its number in the split, mode, width, height, place and size in bytes.
        unreadable: of each other one its number and why it cannot be read.
    """

    facts: str
    stored: list[tuple[int, int, int, int, int, int]]
    unreadable: list[tuple[int, str]]

    @property
    def end(self) -> int:
        """Where its last image ends; 0 if it has none."""
        return self.stored[-1][4] + self.stored[-1][5] if self.stored else 0


class Unfinished:
    """The hidden file and its journal, which this process has to itself until `close`.

    Attributes:
        file: the hidden file.
        before: chunks that an earlier call for the same recipe has left in it.
        is_of_another: whether an earlier call has left chunks for another recipe, which are given up.
    """

    def __init__(self, out: Path, recipe: dict[str, Any]) -> None:
        """Open or make them.

        Args:
            out: what the file becomes.
            recipe: in JSON's types, what it is made of and how. The same recipe makes the same file, byte for byte.

        Raises:
            InUseError: another process is packing `out`.
        """
        self._path = out.with_name(f".{out.name}.partial")
        self._journal = out.with_name(f".{out.name}.partial.jsonl")
        self._lines = LineFile(self._journal)
        try:
            if not self._lines.is_locked:
                raise InUseError(f"another process is packing {out}")
            self.file: BinaryIO = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        except BaseException:
            self._lines.close()
            raise
        header, self._before = json.dumps(recipe), self._journal.read_bytes().split(b"\n")[:-1]
        is_ours = self._before[:1] == [header.encode()]
        self.is_of_another = len(self._before) > 1 and not is_ours
        if not is_ours:
            self._lines.truncate(0)
            self._before = [header.encode()]
        self._waiting = [] if is_ours else [header]
        self.before = list(_chunks(self._before[1:], self._path.stat().st_size))
        self._end = self._kept = max((chunk.end for chunk in self.before), default=0)

    def go_on_after(self, count: int) -> None:
        """Give up what lies behind the first `count` chunks of `before`."""
        if not self._waiting:
            self._lines.truncate(sum(len(line) + 1 for line in self._before[: 1 + count]))
        self._end = self._kept = max((chunk.end for chunk in self.before[:count]), default=0)
        self.file.truncate(self._end)

    def add(self, chunk: Chunk) -> None:
        """Say that these images are written to `file`."""
        self._waiting.append(json.dumps(chunk))
        self._end = max(self._end, chunk.end)
        if self._end - self._kept >= KEEP_EVERY_BYTES:
            self.keep()

    def keep(self) -> None:
        """Put on the disk what was added.

        Raises:
            OSError, InfrastructureError: it cannot be written.
        """
        if self._waiting:
            self.file.flush()
            os.fsync(self.file.fileno())
            if problem := self._lines.append("\n".join(self._waiting)):
                raise InfrastructureError(f"cannot write {self._journal}: {problem}")
            self._waiting, self._kept = [], self._end

    def become(self, out: Path) -> None:
        """Let the file become `out`."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._path.rename(out)
        self._remove()
        self._waiting, self._kept = [], self._end

    def _remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what can be kept, and let others have it; an empty file is removed."""
        with contextlib.suppress(OSError, InfrastructureError):  # a full disk, of which somebody was told
            self.keep()
        with contextlib.suppress(OSError):
            self.file.close()
        if not self._kept:
            self._remove()
        self._lines.close()


def _chunks(lines: list[bytes], file_bytes: int) -> Iterator[Chunk]:
    """The chunks of these lines, up to one that is damaged, or whose images the file has not."""
    for line in lines:
        try:
            chunk = Chunk(*parsed_json(line))
            is_there = chunk.end <= file_bytes
        except (ValueError, TypeError, LookupError):
            return
        if not is_there:
            return
        yield chunk
