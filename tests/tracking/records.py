"""What MLflow has of a run whose database lies in the folder above it."""

import json
import threading

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.tracking import client_of


def config_of(run_dir, **tracking):
    return PretrainConfig.model_validate(
        {"run": {"dir": str(run_dir)}, "data": {"root": "photos"}, "tracking": tracking}
    )


def record_of(run_dir):
    return json.loads((run_dir / "mlflow.json").read_text())


def client_for(folder):
    return client_of(f"sqlite:///{folder / 'mlflow.db'}")


def run_of(run_dir):
    return client_for(run_dir.parent).get_run(record_of(run_dir)["run_id"])


def history_of(run_dir, name):
    history = client_for(run_dir.parent).get_metric_history(record_of(run_dir)["run_id"], name)
    return [(point.step, point.value) for point in history]


def wait_until_sent(tracker):
    for _ in range(600):
        if tracker._outbox.unsent_bytes() == 0:
            return
        threading.Event().wait(0.05)
    raise TimeoutError
