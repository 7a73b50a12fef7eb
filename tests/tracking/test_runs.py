"""Tracking on a sqlite database: what was logged is what is found, and no failure of MLflow stops a training."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moco_dist.config.evaluate import KnnConfig
from moco_dist.config.source import flatten
from moco_dist.distributed.world import World
from moco_dist.errors import Preempted, UserError
from moco_dist.tracking import Tracker, ui_command
from tests.tracking.records import client_for, config_of, history_of, record_of, run_of, wait_until_sent

pytest.importorskip("mlflow")
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own
SECRET_URI = "http://someone:hunter2@127.0.0.1:1"


def test_a_pretraining_is_recorded(runs, tmp_path):
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    config = config_of(runs / "first-try", experiment="shapes")
    points = [(step, 1 / step) for step in range(10, 400, 10)]
    with Tracker.for_pretraining(config, World(rank=0, world_size=8, local_world_size=4)) as tracker:
        for step, loss in points:
            tracker.log_metrics(step, {"loss": loss, "lr": 0.5})
        tracker.log_artifact(picture, "report")

    run = run_of(runs / "first-try")
    assert run.info.run_name == "first-try"
    assert run.info.status == "FINISHED"
    assert history_of(runs / "first-try", "loss") == points
    assert history_of(runs / "first-try", "lr") == [(step, 0.5) for step, _ in points]
    assert run.data.params["optim.base_lr"] == "0.03"
    assert run.data.params.keys() == flatten(config).keys()
    assert run.data.tags["world_size"] == "8"
    assert run.data.tags["num_nodes"] == "2"
    assert run.data.tags["version.torch"]
    assert client_for(runs).get_experiment(run.info.experiment_id).name == "shapes"
    assert record_of(runs / "first-try")["tracking_uri"] == f"sqlite:///{runs}/mlflow.db"


def test_artifacts_lie_beside_the_database(runs, tmp_path):
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    with Tracker.for_pretraining(config_of(runs / "a", experiment="new"), World()) as tracker:
        tracker.log_artifact(picture, "report")
    assert [p.read_text() for p in (runs / "mlflow-artifacts").glob("**/report/picture.txt")] == ["pixels"]


def test_a_resumed_pretraining_goes_on_in_the_same_run(runs):
    with pytest.raises(KeyboardInterrupt), Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
        raise KeyboardInterrupt
    first = record_of(runs / "a")
    with Tracker.for_pretraining(config_of(runs / "a", experiment="ignored"), World()) as tracker:
        wait_until_sent(tracker)
        assert run_of(runs / "a").info.status == "RUNNING"
        tracker.log_metrics(2, {"loss": 2.0})
    assert record_of(runs / "a")["run_id"] == first["run_id"]
    assert history_of(runs / "a", "loss") == [(1, 3.0), (2, 2.0)]
    assert run_of(runs / "a").info.status == "FINISHED"


@pytest.mark.parametrize("loss", ["deleted", "other server"])
def test_a_run_the_server_does_not_have_begins_anew(runs, loss, empty_database):
    with Tracker.for_pretraining(config_of(runs / "a"), World()):
        pass
    first = record_of(runs / "a")["run_id"]
    if loss == "deleted":
        client_for(runs).delete_run(first)
    else:
        other = runs / "other" / "mlflow.db"
        other.parent.mkdir()
        shutil.copy(empty_database, other)
    tracking = {} if loss == "deleted" else {"uri": f"sqlite:///{other}"}
    with Tracker.for_pretraining(config_of(runs / "a", **tracking), World()):
        pass
    assert record_of(runs / "a")["run_id"] != first


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
def test_how_the_run_ended(runs, error, status):
    def body():
        with Tracker.for_pretraining(config_of(runs / "a"), World()):
            if error:
                raise error

    if error:
        with pytest.raises(error):
            body()
    else:
        body()
    assert run_of(runs / "a").info.status == status


@pytest.mark.parametrize(("trains", "status"), [(False, "FINISHED"), (True, "FAILED")])
def test_a_refused_start_after_the_end_does_not_make_a_run_failed(runs, trains, status):
    """Unless it got further before it failed."""
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 1.0})
    with pytest.raises(UserError), Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        if trains:
            tracker.log_metrics(2, {"loss": 1.0})
        raise UserError("data.root photos does not exist")
    assert run_of(runs / "a").info.status == status


@pytest.mark.parametrize(
    ("tracking", "world"), [({"backend": "none"}, World()), ({}, World(rank=1, world_size=2, local_world_size=2))]
)
def test_nothing_is_tracked_without_a_backend_or_on_other_ranks(tmp_path, tracking, world):
    with Tracker.for_pretraining(config_of(tmp_path / "a", **tracking), world) as tracker:
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.log_artifact(tmp_path / "nothing", "report")
    assert list(tmp_path.iterdir()) == []
    assert ui_command(tmp_path / "a") == "not tracked (--tracking.backend none)"


def test_an_evaluation_is_a_child_of_the_pretraining(runs):
    with Tracker.for_pretraining(config_of(runs / "a"), World()):
        pass
    config = KnnConfig(run_dir=runs / "a", neighbours=(5,))
    with Tracker.for_evaluation(config, "knn", "untrained") as tracker:
        tracker.log_metrics(0, {"knn_top1_k5": 12.5})
    parent = run_of(runs / "a")
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    (child,) = client_for(runs).search_runs([parent.info.experiment_id], query)
    assert child.info.status == "FINISHED"
    assert child.info.run_name == "knn untrained"
    assert child.data.tags["encoder"] == "untrained"
    assert child.data.params["neighbours"] == "[5]"
    assert child.data.metrics == {"knn_top1_k5": 12.5}
    assert parent.data.metrics == {}


def test_evaluations_of_a_part_of_the_head_have_names_of_their_own(runs):
    """And their accuracies are not the run's."""
    with Tracker.for_pretraining(config_of(runs / "a"), World()):
        pass
    for variant, top1 in (("", 60.0), ("_head1", 50.0), ("_labels0.1_head2", 40.0)):
        with Tracker.for_evaluation(KnnConfig(run_dir=runs / "a"), "linear", "trained", variant) as tracker:
            tracker.log_metrics(9, {"linear_top1": top1})
    parent = run_of(runs / "a")
    assert parent.data.metrics == {"linear_top1": 60.0}
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client_for(runs).search_runs([parent.info.experiment_id], query)
    names = {"linear trained", "linear trained head1", "linear trained labels0.1 head2"}
    assert {child.info.run_name for child in children} == names


def test_runs_of_one_experiment_keep_apart(runs):
    for seed in (1, 2):
        config = config_of(runs / f"seed{seed}")
        config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        with Tracker.for_pretraining(config, World()) as tracker:
            tracker.log_metrics(seed, {"loss": seed})
    for seed in (1, 2):
        assert run_of(runs / f"seed{seed}").data.params["run.seed"] == str(seed)
        assert history_of(runs / f"seed{seed}", "loss") == [(seed, seed)]


@pytest.mark.parametrize("has_parent", [True, False])
def test_an_evaluation_need_not_be_tracked(runs, has_parent, capsys):
    if has_parent:
        with Tracker.for_pretraining(config_of(runs / "a"), World()):
            pass
    config = KnnConfig(run_dir=runs / "a", tracking="none" if has_parent else "mlflow")
    before = len(client_for(runs).search_runs(["0", "1"]))
    with Tracker.for_evaluation(config, "knn", "trained") as tracker:
        tracker.log_metrics(0, {"knn_top1_k5": 12.5})
    assert len(client_for(runs).search_runs(["0", "1"])) == before
    assert capsys.readouterr().err == ""


def test_a_reopened_run_keeps_its_status(runs, tmp_path):
    page = tmp_path / "index.html"
    page.write_text("page")
    with (
        pytest.raises(ValueError, match="boom"),
        Tracker.for_pretraining(config_of(runs / "a", experiment="new"), World()),
    ):
        raise ValueError("boom")
    with Tracker.reopen(runs / "a") as tracker:
        tracker.log_artifact(page, "report")
    assert run_of(runs / "a").info.status == "FAILED"
    (artifact,) = client_for(runs).list_artifacts(record_of(runs / "a")["run_id"], "report")
    assert artifact.path == "report/index.html"


def test_a_preempted_run_says_so_until_it_goes_on(runs):
    with pytest.raises(Preempted), Tracker.for_pretraining(config_of(runs / "a"), World()):
        raise Preempted(7)
    run = run_of(runs / "a")
    assert (run.info.status, run.data.tags["preempted"]) == ("KILLED", "true")
    with Tracker.for_pretraining(config_of(runs / "a"), World()):
        pass
    run = run_of(runs / "a")
    assert (run.info.status, run.data.tags["preempted"]) == ("FINISHED", "false")


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("nonsense://x", "is neither a server nor a database; what a run can be told to begins with http://"),
        ("some/folder", "is neither a server nor a database"),
        ("mlflow.example:5000", "is neither a server nor a database"),
        ("htp://host", "mean http?"),
        ("postgres://u:hunter2@host/db", "mean postgresql?"),
        ("file:///srv/mlruns", "no longer writes; sqlite:////srv/mlruns/mlflow.db is a database there"),
        ("tests", f"no longer writes; sqlite:///{Path('tests').absolute()}/mlflow.db is a database there"),
    ],
)
def test_a_uri_that_mlflow_cannot_use(tmp_path, uri, hint):
    with pytest.raises(UserError, match=r"^tracking\.uri .*--tracking\.backend none$") as caught:
        Tracker.for_pretraining(config_of(tmp_path / "a", uri=uri), World())
    assert hint in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_mlflow_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"mlflow is not installed; pip install mlflow.*--tracking\.backend none"):
        Tracker.for_pretraining(config_of(tmp_path / "a"), World())


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "mlflow.json").write_text("{")
    with pytest.raises(UserError, match="mlflow.json is damaged"):
        Tracker.reopen(tmp_path)


def test_the_setting_goes_over_the_environment(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET_URI)
    with Tracker.for_pretraining(config_of(tmp_path / "a", uri=f"sqlite:///{runs}/mlflow.db"), World()):
        pass
    assert record_of(tmp_path / "a")["tracking_uri"] == f"sqlite:///{runs}/mlflow.db"
    with Tracker.for_pretraining(config_of(tmp_path / "b"), World()):
        pass
    assert record_of(tmp_path / "b")["tracking_uri"] == "http://127.0.0.1:1"


def test_a_database_that_moved_with_its_runs_is_found(runs, monkeypatch):
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
    moved = runs.rename(runs.with_name("elsewhere"))
    monkeypatch.setenv("PATH", "")
    command = ui_command(moved / "a")
    assert command.endswith(f"mlflow ui --backend-store-uri sqlite:///{moved}/mlflow.db")
    assert Path(command.split()[0]).resolve().is_file()  # a virtual environment that is not activated
    with Tracker.for_pretraining(config_of(moved / "a"), World()) as tracker:
        tracker.log_metrics(2, {"loss": 2.0})
    assert history_of(moved / "a", "loss") == [(1, 3.0), (2, 2.0)]


@pytest.mark.parametrize("trained_further", [False, True])
def test_a_copied_run_says_whose_it_is(runs, tmp_path, trained_further, capsys):
    """Alone, without the database: its evaluations go to the original's run, and its own training does not."""
    original, copy = runs / "a", tmp_path / "elsewhere" / "b"
    config = config_of(original, uri=f"sqlite:///{runs}/mlflow.db")
    with Tracker.for_pretraining(config, World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
    shutil.copytree(original, copy)
    if trained_further:
        with Tracker.for_pretraining(config_of(copy, uri=f"sqlite:///{runs}/mlflow.db"), World()) as tracker:
            tracker.log_metrics(2, {"loss": 2.0})
        assert f"{copy} is a copy of {original}; it goes on as an MLflow run of its own" in capsys.readouterr().err
    with Tracker.for_evaluation(KnnConfig(run_dir=copy), "knn", "trained") as tracker:
        tracker.log_metrics(2, {"knn_top1": 12.5})
    told = f"{copy} is a copy of {original}, and adds to its MLflow run, at sqlite:///{runs}/mlflow.db"
    assert (told in capsys.readouterr().err) == (not trained_further)
    assert history_of(original, "loss") == [(1, 3.0)]
    assert (record_of(copy)["run_id"] == record_of(original)["run_id"]) == (not trained_further)
    if trained_further:
        own = client_for(runs).get_run(record_of(copy)["run_id"])
        assert own.info.run_name == "b"
        history = client_for(runs).get_metric_history(own.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0)]


def test_a_copy_beside_the_original_says_whose_it_is(runs, capsys):
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
    shutil.copytree(runs / "a", runs / "b")
    with Tracker.for_evaluation(KnnConfig(run_dir=runs / "b"), "knn", "trained"):
        pass
    assert f"{runs / 'b'} is a copy of {runs / 'a'}, and adds to its MLflow run" in capsys.readouterr().err
    with Tracker.for_pretraining(config_of(runs / "b"), World()) as tracker:
        tracker.log_metrics(2, {"loss": 2.0})
    assert f"{runs / 'b'} is a copy of {runs / 'a'}; it goes on as an MLflow run of its own" in capsys.readouterr().err
    assert history_of(runs / "a", "loss") == [(1, 3.0)]


def test_a_database_in_the_home_folder(runs, monkeypatch):
    """Whether or not a shell has seen its path."""
    monkeypatch.setenv("HOME", str(runs))
    with Tracker.for_pretraining(config_of(runs / "a", uri="sqlite:///~/mlflow.db"), World()):
        pass
    assert record_of(runs / "a")["tracking_uri"] == f"sqlite:///{runs}/mlflow.db"
    with pytest.raises(UserError, match="has \\$HOME, which only a shell replaces"):
        Tracker.for_pretraining(config_of(runs / "b", uri="sqlite:///$HOME/mlflow.db"), World())


def test_a_run_that_was_copied_with_its_database_has_that_one(runs, capsys):
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
    copies = runs.with_name("copies")
    shutil.copytree(runs, copies)
    with Tracker.for_evaluation(KnnConfig(run_dir=copies / "a"), "knn", "trained") as tracker:
        tracker.log_metrics(2, {"knn_top1": 12.5})
    with Tracker.for_pretraining(config_of(copies / "a"), World()) as tracker:
        tracker.log_metrics(2, {"loss": 2.0})
    run_id = record_of(runs / "a")["run_id"]
    assert record_of(copies / "a")["run_id"] == run_id
    for folder, expected in ((runs, [1]), (copies, [1, 2])):
        assert [point.step for point in client_for(folder).get_metric_history(run_id, "loss")] == expected
        children = client_for(folder).search_runs(["1"], f"tags.`mlflow.parentRunId` = '{run_id}'")
        assert len(children) == len(expected) - 1
    assert "copy of" not in capsys.readouterr().err


def test_experiment_of_the_environment(runs, monkeypatch, capsys):
    """A setting goes over it; what is not heard is said."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123")
    for name, tracking, expected in (("a", {}, "of the environment"), ("b", {"experiment": "moco_dist"}, "moco_dist")):
        with Tracker.for_pretraining(config_of(runs / name, **tracking), World()):
            pass
        run = run_of(runs / name)
        assert client_for(runs).get_experiment(run.info.experiment_id).name == expected
        assert run.data.params["tracking.experiment"] == expected
    assert capsys.readouterr().err.count("MLFLOW_RUN_ID is not used: a run's folder says which MLflow run it is") == 2


def test_ui_command_of_a_server_is_its_page(tmp_path, monkeypatch):
    saved = {"tracking_uri": "https://host/mlflow", "experiment_id": "7", "run_id": "abc"}
    (tmp_path / "mlflow.json").write_text(json.dumps(saved))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://u:p@host/mlflow")
    assert ui_command(tmp_path) == (
        "python -m webbrowser 'https://host/mlflow/#/experiments/7/runs/abc?workflowType=machine_learning'"
    )


def test_system_metrics_are_recorded(runs, monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        wait_until_sent(tracker)
        pause = threading.Event()
        for _ in range(600):
            if "system/cpu_utilization_percentage" in run_of(runs / "a").data.metrics:
                break
            pause.wait(0.05)
    assert "system/cpu_utilization_percentage" in run_of(runs / "a").data.metrics


def test_mlflow_is_quiet_and_sends_no_telemetry(first_runs):
    folder, printed = first_runs
    assert printed == "no telemetry: True\n"
    assert not (folder / "mlruns").exists()  # the working directory stays as it was


def test_what_sets_filters_of_warnings_is_imported_before_there_are_threads():
    """Or a warning about SOCKS is printed now and then: another thread may undo the filter that silences it."""
    asks = "from moco_dist.tracking import tracker; tracker._require_mlflow()"
    code = f"import sys; {asks}; print('requests' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
