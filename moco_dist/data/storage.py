"""Reading from storage that stumbles: a file server's hiccup is waited out, and told, instead of ending a run."""

import errno
import os
import stat
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from moco_dist.config.address import Url
from moco_dist.data.images import ImageStorageError

T = TypeVar("T")

WAITS_SECONDS = (0.5, 2.0, 8.0)  # before the second, third and fourth try
SLOW_SECONDS = 10.0  # a file that takes longer is told
TELL_EVERY_SECONDS = 60.0  # at most one line of a process in this time
# Answers, not hiccups: asking again would not change them. ESTALE is not among them: a path is looked up anew.
FINAL = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP,
         errno.ENXIO, errno.EINVAL}  # fmt: skip

READ_BYTES = 2**20  # at once, of what tells no size
NO_FILE = "a pipe, socket or device, and no file"

_last_told = -TELL_EVERY_SECONDS


def read_patiently(path: Path | str) -> bytes:
    """The content of a file, by `patiently`.

    Raises:
        OSError: it is missing or forbidden, or has failed four times.
    """
    return patiently(lambda: read_file(path), str(path))


def read_file(path: Path | str) -> bytes:
    """The content of a plain file, in two thirds of the time that `open_file(path).read()` takes.

    Raises:
        OSError: it is none, or cannot be read.
    """
    descriptor, size = _plain_file(path)
    try:
        content = os.read(descriptor, size)
        if len(content) < size or not size:  # it was read in part, or its file system tells no sizes
            while part := os.read(descriptor, READ_BYTES):
                content += part
        return content
    finally:
        os.close(descriptor)


def open_file(path: Path) -> BinaryIO:
    """A plain file, to be read.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    return open(_plain_file(path)[0], "rb")


class PlacedFile:
    """A file that is read at places. It is opened when it is needed, and anew after an error."""

    def __init__(self, path: Path, facts: tuple[int, int] | None = None) -> None:
        """`facts`: size in bytes and modification time in ns, by which one that has changed since is known."""
        self.path, self._facts = path, facts
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}  # a process that is not a fork opens the file itself

    def announce(self, start: int, size: int) -> None:
        """Have the kernel read a place ahead.

        Raises:
            OSError: the file cannot be opened, or has changed.
        """
        os.posix_fadvise(self._open(), start, size, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, size: int) -> bytearray:
        """`size` bytes from `start` on, in memory that may be written.

        Raises:
            OSError: they cannot be read, or the file has changed.
        """
        try:
            descriptor = self._open()
            is_there = 0 <= size <= os.fstat(descriptor).st_size - start  # seen before memory is asked for
            data = bytearray(size if is_there else 0)
            if not is_there or os.preadv(descriptor, [data], start) < size:
                raise OSError(errno.EIO, "the file ends before it")
        except OSError:
            self._descriptor = None  # a file server may have forgotten it: the next try opens the file anew
            raise
        return data

    def _open(self) -> int:
        if self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            status = os.fstat(descriptor)
            if self._facts not in (None, (status.st_size, status.st_mtime_ns)):
                raise OSError(errno.EINVAL, "the file has changed since its images were listed; start again")
            self._descriptor = descriptor
        return self._descriptor


def patiently(read: Callable[[], T], name: str, waits_seconds: Sequence[float] = WAITS_SECONDS) -> T:
    """Call `read`, again after each wait while it fails; a line tells of errors and slowness by `name`.

    Raises:
        OSError: `read`'s, if waiting does not change it, or for the last time.
    """
    for wait_seconds in (*waits_seconds, None):
        started = time.monotonic()
        try:
            content = read()
        except OSError as error:
            if error.errno in FINAL or wait_seconds is None:
                raise
            _tell(f"reading {name} failed ({_reason(error)}); tried again in {wait_seconds:g} s")
            time.sleep(wait_seconds)
            continue
        if (seconds := time.monotonic() - started) > SLOW_SECONDS:
            _tell(f"reading {name} took {seconds:.0f} s")
        return content
    raise AssertionError("the last try returns or raises")


def raise_if_storage_failed(error: Exception) -> None:
    """Raise it, if a disk or file server failed: images that it holds are not damaged, and none is to be left out.

    Args:
        error: that a file cannot be read, for whatever reason.
    """
    reason = error.__cause__
    if isinstance(error, ImageStorageError) and isinstance(reason, OSError) and reason.errno not in FINAL:
        raise error


def is_gone(root: Path | Url) -> bool:
    """Whether nothing is left of a folder or file that was there: removed, renamed, or its server does not answer.

    An empty folder is what unmounting leaves. What lies at an address fails by itself when its server does.
    """
    if isinstance(root, Url):
        return False
    try:
        if not root.is_dir():
            return not root.exists()
        with os.scandir(root) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _plain_file(path: Path | str) -> tuple[int, int]:
    """A descriptor and the bytes of a file. A pipe would be waited for, and a device has no end: they are refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, NO_FILE) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if number == errno.EISDIR else NO_FILE)
    return descriptor, status.st_size


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _tell(text: str) -> None:
    """A line of this process; it may be a loader's worker, of any rank."""
    global _last_told
    if time.monotonic() - _last_told >= TELL_EVERY_SECONDS:
        _last_told = time.monotonic()
        print(f"[rank {os.environ.get('RANK', '0')}] warning: {text}", file=sys.stderr, flush=True)
