"""Files that a crash, a full disk or a second writer leaves whole."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def key_of(facts: Any) -> str:
    """16 hex digits of plain values (as JSON has them): a name for what was computed from them."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def parsed_json(text: str | bytes) -> Any:
    """The value of a text in JSON.

    Raises:
        ValueError: it is none, or is nested deeper than anybody writes, for which `json` has a RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_whole(path: Path, content: bytes | Sequence[bytes | memoryview]) -> None:
    """Write a file that is complete whenever it is there; makes its folder. `content` may be in parts."""
    with whole_file(path) as partial:
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            with partial.open("wb") as file:
                file.writelines(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to within a `with`; what is there takes the place of `path` at its end. Makes the folder.

    It is a name that nobody knows before: neither a second process that writes the same file nor somebody who puts a
    link in its place can come between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_record(line: bytes) -> dict[str, Any] | None:
    """A line of a file of JSON objects; None where it is damaged: nothing depends on a whole log or journal."""
    try:
        record = parsed_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def is_held(error: OSError) -> bool:
    """Whether a lock was refused because another process holds it; else the file system has no locks."""
    return error.errno in (errno.EACCES, errno.EAGAIN)


class LineFile:
    """Lines in a file, each written whole or not at all.

    A line that cannot be written (a full disk) waits in memory and is tried again with the next one: a training does
    not end for want of a line. What a crash left of a half-written line is cut off.

    Attributes:
        is_locked: whether this process has the file to itself until `close`. If another one has, maybe on another host
            and in the middle of a line, nothing is cut off before the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._size = -1  # until the file was cut off
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_locked = True
        except OSError as error:
            self.is_locked = not is_held(error)
        if self.is_locked:
            self.truncate(_end_of_last_line(path))

    def truncate(self, size_bytes: int) -> None:
        """Cut the file off."""
        os.ftruncate(self._fd, size_bytes)
        self._size = size_bytes

    def append(self, line: str) -> str:
        """Add a line; returns why it could not be written yet, or ""."""
        if self._size < 0:
            self.truncate(_end_of_last_line(self.path))
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
