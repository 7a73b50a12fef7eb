"""A remote file that is read as a local one where a reader goes through it in jumps, as one of tar headers does."""

import io

from moco_dist.config.address import Url
from moco_dist.data.remote.store import FIRST_WAITS_SECONDS, Object, read_range
from moco_dist.data.storage import patiently

SMALLEST, LARGEST = 2**12, 2**20  # bytes of a window


class WindowFile(io.RawIOBase):
    """Reads an object by windows: small ones where the reader jumps, larger and larger ones where it goes on."""

    def __init__(self, url: Url, known: Object) -> None:
        super().__init__()
        self._url, self._known, self._at = url, known, 0
        self._start, self._window, self._length = 0, memoryview(b""), SMALLEST

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._known.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; fewer at the end.

        Raises:
            OSError: the object cannot be read, or has changed.
        """
        end = self._known.size if size < 0 else min(self._at + size, self._known.size)
        parts = []
        while self._at < end:
            if not self._start <= self._at < self._start + len(self._window):
                self._fetch(end)
            part = self._window[self._at - self._start : end - self._start]
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def _fetch(self, end: int) -> None:
        gap = self._at - self._start - len(self._window)
        near = 0 <= gap < self._length
        self._length = min(self._length * 4, LARGEST) if near else max(self._length // 4, SMALLEST)
        start, size = self._at, min(max(self._length, end - self._at), self._known.size - self._at)
        self._window = patiently(
            lambda: read_range(self._url, start, size, self._known), self._url, FIRST_WAITS_SECONDS
        )
        self._start = start
