"""Tracking on a sqlite database: what was logged is what is found, and no failure of MLflow stops a training."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from moco_dist.config import KnnConfig, PretrainConfig
from moco_dist.config_source import flatten
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.tracking import Tracker, ui_command, without_credentials

pytest.importorskip("mlflow")
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own
SECRET_URI = "http://someone:hunter2@127.0.0.1:1"


@pytest.fixture(scope="session")
def first_process(tmp_path_factory):
    """A run where no database was, in a process of its own: the database, and what the process printed.

    Once for all tests, since MLflow takes seconds to make its tables. Without the variables that say "this is a
    test", under which MLflow's telemetry would be off by itself.
    """
    folder = tmp_path_factory.mktemp("first")
    script = f"""
from moco_dist.config import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.tracking import Tracker
config = PretrainConfig.model_validate({{"run": {{"dir": {str(folder / "run")!r}}}, "data": {{"root": "x"}}}})
with Tracker.for_pretraining(config, World()) as tracker:
    tracker.log_metrics(1, {{"loss": 1.0}})
from mlflow.telemetry.utils import is_telemetry_disabled
print("no telemetry:", is_telemetry_disabled())
"""
    ignored = ("MLFLOW_", "CI", "GITHUB_", "PYTEST_", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ignored)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )
    return folder / "mlflow.db", done.stdout


@pytest.fixture
def empty_database(first_process):
    return first_process[0]


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


def _config(run_dir, **tracking):
    return PretrainConfig.model_validate(
        {"run": {"dir": str(run_dir)}, "data": {"root": "photos"}, "tracking": tracking}
    )


def _saved(run_dir):
    return json.loads((run_dir / "mlflow.json").read_text())


def _client(folder):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def _run(run_dir):
    return _client(run_dir.parent).get_run(_saved(run_dir)["run_id"])


def _history(run_dir, name):
    history = _client(run_dir.parent).get_metric_history(_saved(run_dir)["run_id"], name)
    return [(point.step, point.value) for point in history]


def test_a_pretraining_is_recorded(runs, tmp_path):
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    config = _config(runs / "first-try", experiment="shapes")
    points = [(step, 1 / step) for step in range(10, 400, 10)]
    with Tracker.for_pretraining(config, World(rank=0, world_size=8, local_world_size=4)) as tracker:
        for step, loss in points:
            tracker.log_metrics(step, {"loss": loss, "lr": 0.5})
        tracker.log_artifact(picture, "report")

    run = _run(runs / "first-try")
    assert run.info.run_name == "first-try"
    assert run.info.status == "FINISHED"
    assert _history(runs / "first-try", "loss") == points
    assert _history(runs / "first-try", "lr") == [(step, 0.5) for step, _ in points]
    assert run.data.params["optim.base_lr"] == "0.03"
    assert run.data.params.keys() == flatten(config).keys()
    assert run.data.tags["world_size"] == "8"
    assert run.data.tags["num_nodes"] == "2"
    assert run.data.tags["version.torch"]
    assert _client(runs).get_experiment(run.info.experiment_id).name == "shapes"
    assert _saved(runs / "first-try")["tracking_uri"] == f"sqlite:///{runs}/mlflow.db"


def test_artifacts_lie_beside_the_database(runs, tmp_path):
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    with Tracker.for_pretraining(_config(runs / "a", experiment="new"), World()) as tracker:
        tracker.log_artifact(picture, "report")
    assert [p.read_text() for p in (runs / "mlflow-artifacts").glob("**/report/picture.txt")] == ["pixels"]


def test_a_resumed_pretraining_goes_on_in_the_same_run(runs):
    with pytest.raises(KeyboardInterrupt), Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
        raise KeyboardInterrupt
    first = _saved(runs / "a")
    with Tracker.for_pretraining(_config(runs / "a", experiment="ignored"), World()) as tracker:
        assert _run(runs / "a").info.status == "RUNNING"
        tracker.log_metrics(2, {"loss": 2.0})
    assert _saved(runs / "a") == first
    assert _history(runs / "a", "loss") == [(1, 3.0), (2, 2.0)]
    assert _run(runs / "a").info.status == "FINISHED"


@pytest.mark.parametrize("loss", ["deleted", "other server"])
def test_a_run_the_server_does_not_have_begins_anew(runs, loss, empty_database):
    with Tracker.for_pretraining(_config(runs / "a"), World()):
        pass
    first = _saved(runs / "a")["run_id"]
    if loss == "deleted":
        _client(runs).delete_run(first)
    else:
        other = runs / "other" / "mlflow.db"
        other.parent.mkdir()
        shutil.copy(empty_database, other)
    tracking = {} if loss == "deleted" else {"uri": f"sqlite:///{other}"}
    with Tracker.for_pretraining(_config(runs / "a", **tracking), World()):
        pass
    assert _saved(runs / "a")["run_id"] != first


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
def test_how_the_run_ended(runs, error, status):
    def body():
        with Tracker.for_pretraining(_config(runs / "a"), World()):
            if error:
                raise error

    if error:
        with pytest.raises(error):
            body()
    else:
        body()
    assert _run(runs / "a").info.status == status


@pytest.mark.parametrize(
    ("tracking", "world"), [({"backend": "none"}, World()), ({}, World(rank=1, world_size=2, local_world_size=2))]
)
def test_nothing_is_tracked_without_a_backend_or_on_other_ranks(tmp_path, tracking, world):
    with Tracker.for_pretraining(_config(tmp_path / "a", **tracking), world) as tracker:
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.log_artifact(tmp_path / "nothing", "report")
    assert list(tmp_path.iterdir()) == []
    assert ui_command(tmp_path / "a") == "not tracked (--tracking.backend none)"


def test_an_evaluation_is_a_child_of_the_pretraining(runs):
    with Tracker.for_pretraining(_config(runs / "a"), World()):
        pass
    config = KnnConfig(run_dir=runs / "a", neighbours=(5,))
    with Tracker.for_evaluation(config, "knn", "untrained") as tracker:
        tracker.log_metrics(0, {"knn_top1_k5": 12.5})
    parent = _run(runs / "a")
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    (child,) = _client(runs).search_runs([parent.info.experiment_id], query)
    assert child.info.status == "FINISHED"
    assert child.info.run_name == "knn untrained"
    assert child.data.tags["encoder"] == "untrained"
    assert child.data.params["neighbours"] == "[5]"
    assert child.data.metrics == {"knn_top1_k5": 12.5}
    assert parent.data.metrics == {}


@pytest.mark.parametrize("has_parent", [True, False])
def test_an_evaluation_need_not_be_tracked(runs, has_parent, capsys):
    if has_parent:
        with Tracker.for_pretraining(_config(runs / "a"), World()):
            pass
    config = KnnConfig(run_dir=runs / "a", tracking="none" if has_parent else "mlflow")
    before = len(_client(runs).search_runs(["0", "1"]))
    with Tracker.for_evaluation(config, "knn", "trained") as tracker:
        tracker.log_metrics(0, {"knn_top1_k5": 12.5})
    assert len(_client(runs).search_runs(["0", "1"])) == before
    assert capsys.readouterr().err == ""


def test_a_reopened_run_keeps_its_status(runs, tmp_path):
    page = tmp_path / "index.html"
    page.write_text("page")
    with pytest.raises(ValueError, match="boom"), Tracker.for_pretraining(
        _config(runs / "a", experiment="new"), World()
    ):
        raise ValueError("boom")
    with Tracker.reopen(runs / "a") as tracker:
        tracker.log_artifact(page, "report")
    assert _run(runs / "a").info.status == "FAILED"
    (artifact,) = _client(runs).list_artifacts(_saved(runs / "a")["run_id"], "report")
    assert artifact.path == "report/index.html"


def test_a_step_does_not_wait_and_order_is_kept(runs, monkeypatch):
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        log_batch, released = tracker._client.log_batch, threading.Event()

        def slow(*args, **kwargs):
            assert released.wait(60)
            log_batch(*args, **kwargs)

        monkeypatch.setattr(tracker._client, "log_batch", slow)
        for step in range(5):
            tracker.log_metrics(step, {"loss": step})
        assert _history(runs / "a", "loss") == []  # the server has nothing yet, and we are here
        released.set()
    assert _history(runs / "a", "loss") == [(step, step) for step in range(5)]


def test_an_outage_is_one_warning_and_the_training_goes_on(runs, monkeypatch, capsys):
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        log_batch = tracker._client.log_batch

        def flaky(run_id, metrics):
            if metrics[0].step in (1, 2, 3, 6, 7):
                raise OSError(f"no way to {SECRET_URI}/api. And more")
            log_batch(run_id, metrics)

        monkeypatch.setattr(tracker._client, "log_batch", flaky)
        for step in range(9):
            tracker.log_metrics(step, {"loss": step})
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2  # two outages
    for line in warnings:
        assert "warning" in line
        assert "no way to http://127.0.0.1:1/api" in line
        assert "hunter2" not in line
    assert [step for step, _ in _history(runs / "a", "loss")] == [0, 4, 5, 8]
    assert _run(runs / "a").info.status == "FINISHED"


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as caught:
        Tracker.for_pretraining(_config(tmp_path / "a", uri=SECRET_URI), World())
    message = str(caught.value)
    assert "http://127.0.0.1:1 " in message
    assert "does not answer" in message
    assert "--tracking.backend none" in message
    assert "hunter2" not in message
    assert "\n" not in message
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("uri", ["nonsense://x", "some/folder"])
def test_a_uri_that_mlflow_cannot_use(tmp_path, uri):
    with pytest.raises(UserError, match=rf"{uri} cannot be used: .*--tracking\.backend none$"):
        Tracker.for_pretraining(_config(tmp_path / "a", uri=uri), World())


def test_a_server_that_is_gone_after_the_training_is_a_warning(tmp_path, capsys):
    run_dir = tmp_path / "a"
    run_dir.mkdir()
    saved = {"tracking_uri": "http://127.0.0.1:1", "experiment_id": "1", "run_id": "2"}
    (run_dir / "mlflow.json").write_text(json.dumps(saved))
    with Tracker.for_evaluation(KnnConfig(run_dir=run_dir), "knn", "trained") as tracker:
        tracker.log_metrics(0, {"knn_top1_k5": 12.5})
    (run_dir / "mlflow.json").write_text(json.dumps(saved | {"tracking_uri": "sqlite:////not/there.db"}))
    with Tracker.reopen(run_dir) as tracker:
        tracker.log_metrics(0, {"loss": 1.0})
    first, second = capsys.readouterr().err.splitlines()
    assert "http://127.0.0.1:1: it does not answer" in first
    assert "the database is gone" in second


def test_mlflow_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"mlflow is not installed; pip install mlflow.*--tracking\.backend none"):
        Tracker.for_pretraining(_config(tmp_path / "a"), World())


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "mlflow.json").write_text("{")
    with pytest.raises(UserError, match="mlflow.json is damaged"):
        Tracker.reopen(tmp_path)


def test_the_setting_goes_over_the_environment(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET_URI)
    with Tracker.for_pretraining(_config(tmp_path / "a", uri=f"sqlite:///{runs}/mlflow.db"), World()):
        pass
    assert _saved(tmp_path / "a")["tracking_uri"] == f"sqlite:///{runs}/mlflow.db"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        Tracker.for_pretraining(_config(tmp_path / "b"), World())


def test_a_database_that_moved_with_its_runs_is_found(runs):
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
    moved = runs.rename(runs.with_name("elsewhere"))
    assert ui_command(moved / "a") == f"mlflow ui --backend-store-uri sqlite:///{moved}/mlflow.db"
    with Tracker.for_pretraining(_config(moved / "a"), World()) as tracker:
        tracker.log_metrics(2, {"loss": 2.0})
    assert _history(moved / "a", "loss") == [(1, 3.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://u:p@ss@host:5000/x", "http://host:5000/x"),
        ("API request to https://u:p@host/api failed", "API request to https://host/api failed"),
        ("postgresql+psycopg2://u:p@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("postgresql://db/x?user=u&password=p&sslmode=require", "postgresql://db/x?user=u&password=&sslmode=require"),
        ("sqlite:////a@b/mlflow.db", "sqlite:////a@b/mlflow.db"),
        ("http://host/a@b", "http://host/a@b"),
    ],
)
def test_without_credentials(text, expected):
    assert without_credentials(text) == expected


def test_ui_command_of_a_server_is_its_page(tmp_path, monkeypatch):
    saved = {"tracking_uri": "https://host/mlflow", "experiment_id": "7", "run_id": "abc"}
    (tmp_path / "mlflow.json").write_text(json.dumps(saved))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://u:p@host/mlflow")
    assert ui_command(tmp_path) == "python -m webbrowser 'https://host/mlflow/#/experiments/7/runs/abc'"


def test_system_metrics_are_recorded(runs, monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with Tracker.for_pretraining(_config(runs / "a"), World()):
        pause = threading.Event()
        for _ in range(600):
            if "system/cpu_utilization_percentage" in _run(runs / "a").data.metrics:
                break
            pause.wait(0.05)
    assert "system/cpu_utilization_percentage" in _run(runs / "a").data.metrics


def test_mlflow_is_quiet_and_sends_no_telemetry(first_process):
    database, printed = first_process
    assert printed == "no telemetry: True\n"
    assert _history(database.parent / "run", "loss") == [(1, 1.0)]
    assert not (database.parent / "mlruns").exists()  # the working directory stays as it was
