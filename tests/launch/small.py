"""A pre-training of seconds, and what its folder tells."""

import json
import time
from pathlib import Path

import yaml

from moco_dist.datasets.prepare import prepare_shapes


def write_configs(folder: Path, **run) -> Path:
    """Images, pretrain.yaml for them and linear.yaml; returns the former's path. `run` are settings of its `run`."""
    data = prepare_shapes(folder / "data" / "shapes", num_train=80, num_val=20)
    settings = {
        "run": {"dir": str(folder / "runs" / "small"), "peer_timeout_seconds": 5, **run},
        "data": {"root": str(data), "image_size": 32, "num_workers": 1},
        "model": {"arch": "resnet10", "head_hidden_dims": [16], "bn_group_size": 4},
        "moco": {"queue_size": 64},
        "optim": {"global_batch_size": 8, "epochs": 10_000},
        "log": {"every_steps": 2},
        "checkpoint": {"every_steps": 10},
        "tracking": {"backend": "none"},
    }
    linear = {"features": "cached", "epochs": 1, "milestones": [], "global_batch_size": 8, "tracking": "none",
              "data": {"num_workers": 0}}  # fmt: skip
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(settings))
    (folder / "linear.yaml").write_text(yaml.safe_dump({**linear, "run_dir": "given/by/launch"}))
    return folder / "pretrain.yaml"


def last_step(run_dir: Path) -> int:
    """The last step in the run's log; 0 where there is none."""
    log = run_dir / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(run_dir: Path, step: int, seconds: float = 90, tell=str) -> None:
    """Until the run has logged `step`; `tell()` is what to show if it never does."""
    deadline = time.monotonic() + seconds
    while last_step(run_dir) < step:
        assert time.monotonic() < deadline, tell()
        time.sleep(0.1)
