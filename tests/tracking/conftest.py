"""A database of MLflow for tests that need one."""

import os
import shutil
import subprocess
import sys

import pytest

NUM_FIRST = 3
FIRST = """
import os, sys
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.tracking import Tracker, client_of
client_of("http://localhost:1")  # imports mlflow, once for all, and asks nobody
def run(name):
    with Tracker.for_pretraining(PretrainConfig(run={"dir": name}, data={"root": "x"}), World()) as tracker:
        tracker.log_metrics(1, {"loss": 1.0})
    sys.stdout.flush()
children = []
for i in range(int(sys.argv[1])):
    children.append(os.fork())
    if children[-1] == 0:
        run(f"run{i}")
        os._exit(0)
for child in children:
    os.waitpid(child, 0)
from mlflow.telemetry.utils import is_telemetry_disabled
print("no telemetry:", is_telemetry_disabled())
"""


@pytest.fixture(scope="session")
def first_runs(tmp_path_factory):
    """NUM_FIRST runs that start together where no database was: their folder, and what the processes printed.

    Once for all tests, since MLflow takes seconds to make its tables. Without the variables that say "this is a
    test", under which MLflow's telemetry would be off by itself.
    """
    folder = tmp_path_factory.mktemp("first")
    ignored = ("MLFLOW_", "CI", "GITHUB_", "PYTEST_", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ignored)} | {"PYTHONPATH": os.getcwd()}
    quiet = ("-W", "ignore:This process:DeprecationWarning")  # Python 3.12 and later warn of the forks above
    done = subprocess.run(
        [sys.executable, *quiet, "-c", FIRST, str(NUM_FIRST)], env=environment, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return folder, done.stdout


@pytest.fixture
def empty_database(first_runs):
    return first_runs[0] / "mlflow.db"


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def runs(tmp_path, empty_database):
    """A folder of runs with its database, as any run but the first finds it."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder
