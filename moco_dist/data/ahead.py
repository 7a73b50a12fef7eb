"""Items of an iterator, made ahead of time in a thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them waiting. The thread's exception is raised here.

    The thread ends when the consumer closes the generator, or with the process.
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
                raise value
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
