"""What programs and notebooks may import, as `moco_dist.NAME`. Everything else may change from version to version.

This module is imported when one of its names is first asked for, so that `import moco_dist` alone takes no torch.
"""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moco_dist.cli.pretrain import trained
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.section import path_of
from moco_dist.config.source import read_config
from moco_dist.errors import UserError
from moco_dist.evaluate.backbone import Backbone, Features, load_backbone
from moco_dist.run import logbook, results
from moco_dist.run.folder import RunFolder

__all__ = [
    "Backbone", "Features", "PretrainConfig", "UserError", "load_backbone", "pretrain", "pretrain_config", "read_log",
    "read_results",
]  # fmt: skip


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """The log of a run, a row a step in order: `step`, `loss`, `lr`, and `knn_top1` where it was measured.

    Raises:
        UserError: it is not the folder of a run.
    """
    RunFolder(path_of(run_dir)).require()
    return logbook.read_log(path_of(run_dir))


def read_results(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """What evaluations of a run came to, by names such as `knn_trained`: `accuracy` in percent, `step`, `num_val`.

    Raises:
        UserError: it is not the folder of a run, or a file is damaged.
    """
    return results.read_results(path_of(run_dir))


def pretrain_config(*configs: str | Path, **settings: Any) -> PretrainConfig:
    """The settings of a pre-training.

    Args:
        configs: files, or names of packaged configs; later ones go over earlier ones.
        settings: over all of these, by section: `run={"dir": "runs/mine"}, optim={"epochs": 100}`.

    Raises:
        UserError: a line for each mistake.
    """
    paths = [Path(config) for config in configs]
    return read_config(PretrainConfig, paths[0] if paths else None, list(_flags(settings)), paths[1:])


def _flags(settings: dict[str, Any], section: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{section}{name}.")
        else:
            yield f"--{section}{name}={value if isinstance(value, str | Path) else json.dumps(value)}"


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train as `moco-dist pretrain` does, from the newest checkpoint of `run.dir` if there is one.

    In a program that torchrun starts, each process calls it. It takes Ctrl-C and SIGTERM as requests to save and stop,
    and so has to be called in the main thread.

    Returns:
        the folder of the last checkpoint.

    Raises:
        UserError: a mistake, in a line.
        Preempted: it was asked to stop, and has saved; the same call goes on.
    """
    with _signals_as_before():
        return trained(config)[0]


@contextlib.contextmanager
def _signals_as_before() -> Iterator[None]:
    """After a training, which ends a command, a notebook goes on."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler or signal.SIG_DFL)
