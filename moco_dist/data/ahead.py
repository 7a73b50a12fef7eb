"""Items of an iterator, made ahead of time in a thread."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

from moco_dist.errors import LoadingError

T = TypeVar("T")

_POLL_SECONDS = 0.1
_CLOSE_SECONDS = 60  # a thread that waits for a dead file server is left to the process's end


def ahead(
    items: Generator[T, None, None], depth: int, must_end: Callable[[], bool] = lambda: False
) -> Generator[T, None, None]:
    """The same items in the same order, up to `depth` of them waiting. The thread's exception is raised here.

    `items` is closed, in the thread, when it is at its end or the consumer closes this generator, which waits for it.
    `must_end` is looked at while an item is waited for.

    Raises:
        LoadingError: `must_end` said that nobody may wait any longer.
    """
    made: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                made.put((kind, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    if not put("item", item):
                        return
            put("end", None)
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            put("error", error)

    def take() -> tuple[str, T | BaseException | None]:
        while True:
            try:
                return made.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if must_end():
                    raise LoadingError("asked to stop while no batch has come from the loader") from None

    thread = threading.Thread(target=make, daemon=True, name="loader")
    thread.start()
    try:
        while True:
            kind, value = take()
            if kind == "end":
                return
            if isinstance(value, BaseException) and kind == "error":
                try:
                    raise value
                finally:
                    del value  # its traceback holds this frame
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        thread.join(_CLOSE_SECONDS)
