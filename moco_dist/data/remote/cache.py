"""Blocks of remote files, kept on a disk of this machine for all processes of it.

A remote file has two files here. NAME.blocks holds its bytes at their own places, with holes where nothing was kept
yet. NAME.marks holds a CRC-32 of each block, which is written after the block. A block is believed only where it fits
its mark. So whatever a killed process or a power cut leaves is fetched again, and two processes that keep the same
block write the same. NAME is made of the address, size, entity tag and time of the remote file.

What is read first is kept while there is room, and stays. No other rule answers more reads: an epoch needs every image
once, so what it finds here was here when it began, which is no more than fits. To take out what was used least lately
would be worse: that is what the next epoch needs first.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from moco_dist.config.address import Url
from moco_dist.data.images import Places

BLOCK_BYTES = 2**16
MARK_BYTES = 4
DIGITS = 20  # of the number of bytes in the file `used`
SHARE_OF_FREE = 0.9  # of the disk, which is filled where no limit was given
_USED, _SAID, _LOCK = "used", "said", "lock"

Fetch = Callable[[int, int], memoryview]


class BlockCache:
    """The blocks of one data set. It is opened before a process starts its workers, which share it."""

    def __init__(self, folder: Path, most_bytes: int | None, root: Url, places: Places) -> None:
        """Make the folder, take out files that have changed since, and, for want of room, data sets that nobody reads.

        Args:
            folder: on a disk of this machine; several runs may share it.
            most_bytes: that all blocks in it may take; None: nine tenths of what is free.
            root: address of the data set.
            places: whose files are kept.

        Raises:
            OSError: the folder cannot be made or written.
        """
        self.folder, self._sizes = folder, [size for size, _ in places.facts]
        self._set = folder / _name([root])
        tags = places.tags or [""] * len(places.files)
        self._names = [_name(facts) for facts in zip(places.files, places.facts, tags, strict=True)]
        self._thread = threading.Lock()
        self._may_keep = True
        self._set.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone() as file:
            for path in (self._set / _LOCK, folder / _SAID):
                path.touch(0o600)
            self._hold()
            names = {*self._names}
            for path in self._set.iterdir():
                if path.stem not in names and path.name != _LOCK:
                    path.unlink(missing_ok=True)
            free = shutil.disk_usage(folder).free
            self._most = int(kept_bytes(folder) + SHARE_OF_FREE * free) if most_bytes is None else most_bytes
            self._make_room()
            os.pwrite(file, _number(kept_bytes(folder)), 0)

    def read(self, number: int, start: int, end: int, fetch: Fetch) -> memoryview:
        """Bytes of a file: those blocks that are here, and the rest by `fetch(start, end)`, kept if there is room.

        Args:
            number: of the file.
            start: the first byte.
            end: one past the last.
            fetch: gives a part of the remote file.

        Raises:
            OSError: of `fetch`.
        """
        size, first, last = self._sizes[number], start // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        origin = first * BLOCK_BYTES
        data, missing = self._found(self._set / self._names[number], first, last, size)
        if missing:
            low, high = missing[0] * BLOCK_BYTES, min((missing[-1] + 1) * BLOCK_BYTES, size)
            is_kept = self._reserve(len(missing) * BLOCK_BYTES)
            if not is_kept:  # no more than is asked for
                low, high = max(low, start), min(high, end)
            try:
                part = fetch(low, high)
            except OSError:
                if is_kept:
                    self._reserve(-len(missing) * BLOCK_BYTES)
                raise
            if is_kept:
                self._keep(self._set / self._names[number], low, part)
            if (low, high) == (start, end):
                return part
            data[low - origin : high - origin] = part
        return memoryview(data)[start - origin : end - origin]

    def _found(self, path: Path, first: int, last: int, size: int) -> tuple[bytearray, list[int]]:
        """The bytes of blocks first .. last-1, and the numbers of those that are not here."""
        data = bytearray(min(last * BLOCK_BYTES, size) - first * BLOCK_BYTES)
        try:
            marks = np.frombuffer(_read(_of(path, "marks"), bytearray((last - first) * MARK_BYTES), first * MARK_BYTES),
                                  np.uint32)  # fmt: skip
            if marks.any():
                _read(_of(path, "blocks"), data, first * BLOCK_BYTES)
        except FileNotFoundError:
            return data, list(range(first, last))
        except OSError as error:
            self._say(error)
            return data, list(range(first, last))
        blocks = memoryview(data)
        missing = [
            first + i for i, mark in enumerate(marks.tolist())
            if not mark or mark != _mark(blocks[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES])
        ]  # fmt: skip
        return data, missing

    def _keep(self, path: Path, start: int, part: memoryview) -> None:
        """Write whole blocks, and then their marks; where that fails, nothing is kept any more."""
        marks = [_mark(part[i : i + BLOCK_BYTES]) for i in range(0, len(part), BLOCK_BYTES)]
        try:
            _write(_of(path, "blocks"), part, start)
            _write(
                _of(path, "marks"), memoryview(np.array(marks, np.uint32).tobytes()), start // BLOCK_BYTES * MARK_BYTES
            )
        except OSError as error:
            self._may_keep = False
            self._say(error)

    def _reserve(self, size: int) -> bool:
        """Whether so many bytes more may be kept; they count from now on. A negative number gives them back."""
        if self._may_keep:
            try:
                with self._alone() as file:
                    used = int(os.pread(file, DIGITS, 0)) + size
                    self._may_keep = used <= self._most
                    if self._may_keep:
                        os.pwrite(file, _number(used), 0)
            except (OSError, ValueError) as error:
                self._may_keep = False
                self._say(error)
        return self._may_keep

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """Within it no other thread or process counts, opens or takes out; gives the file with the number of bytes."""
        with self._thread:
            file = os.open(self.folder / _USED, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                os.close(file)

    def _hold(self) -> None:
        """Say that the data set is in use, as long as this process and its workers live."""
        held = os.open(self._set / _LOCK, os.O_RDWR)
        weakref.finalize(self, os.close, held)
        fcntl.flock(held, fcntl.LOCK_SH)

    def _make_room(self) -> None:
        """Take out data sets that no process reads, the oldest first, until this one may be kept as a whole."""
        others = [path for path in self.folder.iterdir() if path.is_dir() and path != self._set]
        for other in sorted(others, key=lambda path: path.stat().st_mtime):
            if sum(self._sizes) + sum(map(_kept_bytes_of, others)) <= self._most:
                return
            with contextlib.suppress(OSError), open(other / _LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)

    def _say(self, error: Exception) -> None:
        """A line, of the first process of this machine that has something to say."""
        why = (getattr(error, "strerror", None) or str(error)).lower()
        with contextlib.suppress(OSError):
            said = os.open(
                self.folder / _SAID, os.O_RDWR
            )  # it stays open, and so its lock, as long as the process lives
            try:
                fcntl.flock(said, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(said)
                return
        print(f"warning: data.cache_dir {self.folder}: {why}; what it lacks is fetched each time", file=sys.stderr)


def opened_cache(folder: Path, most_bytes: int | None, root: Url, places: Places) -> BlockCache | None:
    """The cache; None, with a warning, where its folder cannot be used."""
    try:
        return BlockCache(folder, most_bytes, root, places)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        print(f"warning: data.cache_dir {folder}: {why}; nothing is kept there", file=sys.stderr)
        return None


def kept_bytes(folder: Path) -> int:
    """Bytes of all blocks that lie in a cache's folder; 0 where there is none."""
    return sum(map(_kept_bytes_of, folder.glob("*/")))


def _number(count: int) -> bytes:
    return f"{count:0{DIGITS}d}".encode()


def _name(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()[:32]


def _of(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _mark(block: memoryview) -> int:
    """Never 0, which is what a hole is read as."""
    return zlib.crc32(block) | 1


def _kept_bytes_of(data_set: Path) -> int:
    """Bytes of the blocks that have a mark. What the file system says of holes comes late on some."""
    try:
        contents = (path.read_bytes() for path in data_set.glob("*.marks"))
        marks = (np.frombuffer(content, np.uint32, len(content) // MARK_BYTES) for content in contents)
        return BLOCK_BYTES * sum(map(np.count_nonzero, marks))
    except FileNotFoundError:  # another process has just taken it out
        return 0


def _read(path: Path, data: bytearray, start: int) -> bytearray:
    """Fill `data` from a place of a file on; with zeros where it ends before."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.preadv(file, [data], start)
    finally:
        os.close(file)
    return data


def _write(path: Path, data: memoryview, start: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while data:
            written = os.pwrite(file, data, start)
            data, start = data[written:], start + written
    finally:
        os.close(file)
