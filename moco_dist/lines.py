"""Files of lines that are only added to, and that a crash or a full disk leaves whole."""

import fcntl
import os
from pathlib import Path


class LineFile:
    """Lines in a file, each written whole or not at all.

    A line that cannot be written (a full disk) waits in memory and is tried again with the next one: a training does
    not end for want of a line. What a crash left of a half-written line is cut off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.truncate(_end_of_last_line(path))

    def lock(self) -> bool:
        """Take the file for this process, until `close`; False if another one has it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def truncate(self, size_bytes: int) -> None:
        """Cut the file off."""
        os.ftruncate(self._fd, size_bytes)
        self._size = size_bytes

    def append(self, line: str) -> str:
        """Add a line; returns why it could not be written yet, or ""."""
        self._waiting.append(line.encode() + b"\n")
        content = b"".join(self._waiting)
        try:
            written = 0
            while written < len(content):
                written += os.write(self._fd, content[written:])
        except OSError as error:
            os.ftruncate(self._fd, self._size)  # not half a line
            return (error.strerror or str(error)).lower()
        self._size += len(content)
        self._waiting.clear()
        return ""

    def close(self) -> None:
        """Close the file; lines that still wait are lost."""
        os.close(self._fd)


def _end_of_last_line(path: Path) -> int:
    content = path.read_bytes()
    return content.rfind(b"\n") + 1
