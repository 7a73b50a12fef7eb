"""Tracking on a sqlite database: what was logged is what is found, and no failure of MLflow stops a training."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moco_dist.cli.main import main
from moco_dist.config.evaluate import KnnConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import flatten
from moco_dist.distributed.world import World
from moco_dist.errors import Preempted, UserError
from moco_dist.tracking import Tracker, ui_command, without_credentials
from moco_dist.tracking.outbox import Outbox

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
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.tracking import Tracker
config = PretrainConfig.model_validate({{"run": {{"dir": {str(folder / "run")!r}}}, "data": {{"root": "x"}}}})
with Tracker.for_pretraining(config, World()) as tracker:
    tracker.log_metrics(1, {{"loss": 1.0}})
from mlflow.telemetry.utils import is_telemetry_disabled
print("no telemetry:", is_telemetry_disabled())
"""
    ignored = ("MLFLOW_", "CI", "GITHUB_", "PYTEST_", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ignored)} | {"PYTHONPATH": os.getcwd()}
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


def _wait_until_sent(tracker):
    for _ in range(600):
        if tracker._outbox.unsent_bytes() == 0:
            return
        threading.Event().wait(0.05)
    raise TimeoutError


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
        _wait_until_sent(tracker)
        assert _run(runs / "a").info.status == "RUNNING"
        tracker.log_metrics(2, {"loss": 2.0})
    assert _saved(runs / "a")["run_id"] == first["run_id"]
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
    from mlflow import MlflowClient

    log_batch, released = MlflowClient.log_batch, threading.Event()

    def slow(*args, **kwargs):
        assert released.wait(60)
        log_batch(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        for step in range(5):
            tracker.log_metrics(step, {"loss": step})
        assert _saved(runs / "a")["run_id"] == ""  # the server has nothing yet, and we are here
        released.set()
    assert _history(runs / "a", "loss") == [(step, step) for step in range(5)]


def test_an_outage_is_told_once_and_nothing_is_lost_or_doubled(runs, monkeypatch, capsys):
    """The server fails five times, twice after it has taken what it was sent."""
    from mlflow import MlflowClient

    log_batch, failures = MlflowClient.log_batch, iter(["before", "after", "before", "after", "before"])

    def flaky(self, run_id, metrics=(), **more):
        failure = next(failures, None) if metrics else None
        if failure != "before":
            log_batch(self, run_id, metrics, **more)
        if failure:
            raise OSError(f"no way to {SECRET_URI}/api. And more")

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    monkeypatch.setattr(Outbox, "_wait", lambda *_: None)
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        for step in range(9):
            tracker.log_metrics(step, {"loss": step})
        _wait_until_sent(tracker)
    first, second = capsys.readouterr().err.splitlines()
    assert "no way to http://127.0.0.1:1/api; going on, and keeping what it misses in" in first
    assert "answers again" in second
    assert _history(runs / "a", "loss") == [(step, step) for step in range(9)]
    assert _run(runs / "a").info.status == "FINISHED"


def test_steps_that_are_done_again_are_not_told_again(runs):
    """Killed at step 50 with a checkpoint at 30, and on another number of ranks the numbers differ a little."""
    with pytest.raises(ValueError, match="killed"), Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        for step in range(10, 60, 10):
            tracker.log_metrics(step, {"loss": 1 / step})
        tracker.log_metrics(40, {"knn_top1": 5.0})
        raise ValueError("killed")
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        for step in range(40, 80, 10):
            tracker.log_metrics(step, {"loss": 1 / step + 1e-9})
            tracker.log_metrics(step, {"knn_top1": 5.0})
    expected = [(step, 1 / step + (1e-9 if step > 50 else 0)) for step in range(10, 80, 10)]
    assert _history(runs / "a", "loss") == expected
    assert [step for step, _ in _history(runs / "a", "knn_top1")] == [40, 50, 60, 70]


def test_what_is_refused_for_good_does_not_hold_up_the_rest(runs, capsys):
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.log_metrics(2, {"lo*ss": 1.0})
        tracker.log_metrics(3, {"loss": 3.0})
    assert _history(runs / "a", "loss") == [(1, 1.0), (3, 3.0)]
    assert "left out, since MLflow refuses it" in capsys.readouterr().err


def test_a_preempted_run_says_so_until_it_goes_on(runs):
    with pytest.raises(Preempted), Tracker.for_pretraining(_config(runs / "a"), World()):
        raise Preempted(7)
    run = _run(runs / "a")
    assert (run.info.status, run.data.tags["preempted"]) == ("KILLED", "true")
    with Tracker.for_pretraining(_config(runs / "a"), World()):
        pass
    run = _run(runs / "a")
    assert (run.info.status, run.data.tags["preempted"]) == ("FINISHED", "false")


def test_a_server_that_is_never_there_and_a_sync_later(runs, tmp_path, monkeypatch, capsys):
    """A whole run, resumed once, an evaluation and a report; then the database is where the server should have been."""
    run_dir = runs / "a"
    page = tmp_path / "index.html"
    page.write_text("page")
    config = _config(run_dir, uri=SECRET_URI, experiment="late")
    with pytest.raises(KeyboardInterrupt), Tracker.for_pretraining(config, World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
        raise KeyboardInterrupt
    with Tracker.for_pretraining(config, World()) as tracker:
        tracker.log_metrics(2, {"loss": float("inf")})
    with Tracker.for_evaluation(KnnConfig(run_dir=run_dir), "knn", "trained") as tracker:
        tracker.log_metrics(2, {"knn_top1": 12.5})
    with Tracker.reopen(run_dir) as tracker:
        tracker.log_artifact(page, "report")
    error = capsys.readouterr().err
    assert "http://127.0.0.1:1: it does not answer; going on, and keeping what it misses in" in error
    assert f"deliver it by: moco-dist sync {run_dir}" in error
    assert "hunter2" not in error
    assert "hunter2" not in "".join(path.read_text() for path in run_dir.rglob("*.json*"))
    assert f"moco-dist sync {run_dir}" in ui_command(run_dir)
    assert main(["sync", str(run_dir)]) == 69
    assert capsys.readouterr().err.count("http://127.0.0.1:1: it does not") >= 1

    saved = _saved(run_dir) | {"tracking_uri": f"sqlite:///{runs / 'mlflow.db'}"}
    (run_dir / "mlflow.json").write_text(json.dumps(saved))
    for _ in range(2):  # the second finds nothing to do
        assert main(["sync", str(run_dir)]) == 0
        run = _run(run_dir)
        assert run.info.status == "FINISHED"
        assert run.data.params["optim.base_lr"] == "0.03"
        assert _history(run_dir, "loss") == [(1, 3.0), (2, 1.7976931348623157e308)]  # as MLflow keeps infinity
        query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        (child,) = _client(runs).search_runs([run.info.experiment_id], query)
        assert child.data.metrics == {"knn_top1": 12.5}
    assert "all was delivered before" in capsys.readouterr().out
    assert [path.name for path in (run_dir / "mlflow").iterdir()] == ["pretrain.jsonl"]


def test_a_journal_that_another_process_sends_is_left_to_it(runs, capsys):
    with Tracker.for_pretraining(_config(runs / "a"), World()):
        assert main(["sync", str(runs / "a")]) == 0
    assert "pretrain.jsonl is being delivered by another process" in capsys.readouterr().out


@pytest.mark.parametrize(("uri", "hint"), [("nonsense://x", ""), ("some/folder", ""), ("htp://host", "mean http?"),
                                           ("postgres://u:hunter2@host/db", "mean postgresql?")])
def test_a_uri_that_mlflow_cannot_use(tmp_path, uri, hint):
    with pytest.raises(UserError, match=r"is not one that MLflow knows: .*--tracking\.backend none$") as caught:
        Tracker.for_pretraining(_config(tmp_path / "a", uri=uri), World())
    assert hint in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "a").exists()


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
    with Tracker.for_pretraining(_config(tmp_path / "b"), World()):
        pass
    assert _saved(tmp_path / "b")["tracking_uri"] == "http://127.0.0.1:1"


def test_a_database_that_moved_with_its_runs_is_found(runs, monkeypatch):
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
    moved = runs.rename(runs.with_name("elsewhere"))
    monkeypatch.setenv("PATH", "")
    command = ui_command(moved / "a")
    assert command.endswith(f"mlflow ui --backend-store-uri sqlite:///{moved}/mlflow.db")
    assert Path(command.split()[0]).resolve().is_file()  # a virtual environment that is not activated
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
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("postgresql+psycopg2://u:p/ss@db/mlflow", "postgresql+psycopg2://db/mlflow"),
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
    with Tracker.for_pretraining(_config(runs / "a"), World()) as tracker:
        _wait_until_sent(tracker)
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
