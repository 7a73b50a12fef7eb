"""Items of an iterator, made ahead of time in a thread."""

import contextlib
import queue
import threading
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1


def ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The same items in the same order, up to `depth` of them waiting. The thread's exception is raised here.

    `items` is closed, in the thread, when it is at its end or the consumer closes this generator, which waits for it.
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

    thread = threading.Thread(target=make, daemon=True, name="loader")
    thread.start()
    try:
        while True:
            kind, value = made.get()
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
        thread.join()
