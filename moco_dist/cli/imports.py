"""How commands import torch."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, and what needs it, without looking for garbage, which takes a fifth of the time and finds none."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
