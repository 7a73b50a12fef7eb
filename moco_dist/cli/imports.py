"""How commands import torch."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, and what needs it, without looking for garbage, which takes a fifth of the time and finds none."""
    was_enabled = gc.isenabled()  # whoever calls from Python may have a way of their own
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
