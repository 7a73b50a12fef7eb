"""Lines for people: what cannot be written of them ends no command that has something else to do."""

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def open_closed_descriptors() -> None:
    """Let descriptors 0, 1 and 2 that were closed (`>&-`) be the null device.

    The next file that is opened would get a closed one's number, and what a library prints would be written into it.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:  # Python sets None where there was no stream
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115


def let_lines_be_lost(name: str) -> None:
    """From now on lose what a full disk or a gone reader keeps from being written to `sys.stdout` or `sys.stderr`.

    Args:
        name: stdout or stderr. A stream that is not the process's own, as of a notebook or a test, stays as it is.
    """
    stream = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
        return
    with contextlib.suppress(OSError):
        stream.flush()
    raw = _Lossy(stream.fileno(), "w", closefd=False)
    is_buffered = not stream.write_through  # otherwise PYTHONUNBUFFERED is set, and no line waits in memory
    lossy = io.TextIOWrapper(
        io.BufferedWriter(raw) if is_buffered else cast(BinaryIO, raw), stream.encoding, stream.errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip
    setattr(sys, name, lossy)


class _Lossy(io.FileIO):
    def write(self, data: "ReadableBuffer") -> int:
        with contextlib.suppress(OSError):
            written = super().write(data)
            if written is not None:  # None: a pipe that is full, and that does not wait
                return written
        return memoryview(data).nbytes
