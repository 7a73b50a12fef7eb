"""MoCo v2 (Momentum Contrast v2, arXiv 2003.04297) on one machine or on many."""

import importlib
from typing import TYPE_CHECKING, Any

from moco_dist.provenance import __version__

if TYPE_CHECKING:
    from moco_dist.api import (
        Backbone,
        Features,
        PretrainConfig,
        UserError,
        load_backbone,
        pretrain,
        pretrain_config,
        read_log,
        read_results,
    )

__all__ = [
    "Backbone", "Features", "PretrainConfig", "UserError", "__version__", "load_backbone", "pretrain",
    "pretrain_config", "read_log", "read_results",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A name of `moco_dist.api`, which is imported now: it needs torch."""
    if name in __all__:
        return getattr(importlib.import_module("moco_dist.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
