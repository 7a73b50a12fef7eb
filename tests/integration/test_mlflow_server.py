"""Tracking through a real `mlflow server`: nothing is lost on the way, and losing the server loses no training."""

import json

import pytest

from moco_dist.cli.main import main
from moco_dist.config.evaluate import LinearConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.tracking import Tracker
from tests.faults.processes import steps_logged, wait_for_step
from tests.integration.mlflow_server import Server

pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    server.start()
    yield server
    server.stop()


def _config(run_dir, uri):
    return PretrainConfig.model_validate(
        {"run": {"dir": str(run_dir)}, "data": {"root": "photos"}, "tracking": {"uri": uri, "experiment": "over http"}}
    )


def _history(client, run_id, name):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_runs_on_a_server(server, tmp_path):
    """A pre-training with credentials in its URI, resumed, with an evaluation; then its run is deleted."""
    from mlflow import MlflowClient

    run_dir, uri = tmp_path / "runs" / "first", server.uri.replace("//", "//someone:hunter2@")
    page = tmp_path / "index.html"
    page.write_text("page")
    points = [(step, 10 / step) for step in range(1, 201)]

    with Tracker.for_pretraining(_config(run_dir, uri), World()) as tracker:
        for step, loss in points[:150]:
            tracker.log_metrics(step, {"loss": loss})
    with Tracker.for_pretraining(_config(run_dir, uri), World()) as tracker:
        for step, loss in points[150:]:
            tracker.log_metrics(step, {"loss": loss, "knn_top1": float("nan")})
    with Tracker.for_evaluation(LinearConfig(run_dir=run_dir), "linear", "trained") as tracker:
        tracker.log_metrics(200, {"linear_top1": 67.5})
    with Tracker.reopen(run_dir) as tracker:
        tracker.log_artifact(page, "report")

    saved = json.loads((run_dir / "mlflow.json").read_text())
    client = MlflowClient(server.uri)
    parent = client.get_run(saved["run_id"])
    assert saved["tracking_uri"] == server.uri
    assert (parent.info.run_name, parent.info.status) == ("first", "FINISHED")
    assert _history(client, parent.info.run_id, "loss") == points
    assert len(_history(client, parent.info.run_id, "knn_top1")) == 50
    assert parent.data.params["tracking.uri"] == server.uri
    assert "hunter2" not in str(parent.to_dictionary())

    runs = client.search_runs([saved["experiment_id"]])
    (child,) = [run for run in runs if run.info.run_id != parent.info.run_id]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics == {"linear_top1": 67.5}

    # The file went through the server: it lies in the server's folder, not beside the run.
    assert [p.read_text() for p in (server.folder / "artifacts").rglob("report/index.html")] == ["page"]
    assert client.download_artifacts(parent.info.run_id, "report/index.html", str(tmp_path))
    assert sorted(p.name for p in run_dir.parent.iterdir()) == ["first"]

    client.delete_run(saved["run_id"])  # then a new run gets all of the journal
    with Tracker.for_pretraining(_config(run_dir, uri), World()):
        pass
    anew = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    assert anew != saved["run_id"]
    assert _history(client, anew, "loss") == points


def test_a_password_is_in_nothing_that_any_command_prints_or_writes(server, tmp_path, start, monkeypatch, capfd):
    """Not even where MLflow itself is asked to print pages, and says all that it logs."""
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "false")
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "DEBUG")
    uri, run_dir = server.uri.replace("//", "//someone:hunter2@"), tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    first = start(run_dir, "--tracking.backend", "mlflow", "--tracking.uri", uri, "--run.stop-at-step", "4", ranks=1)
    printed = first.communicate()[0]
    assert first.returncode == 0, printed
    assert f"View run run at: {server.uri}/#/experiments/" in printed
    knn = ["knn", "--run-dir", str(run_dir), "--encoders", "trained", "--data.num-workers", "0", "--neighbours", "5"]
    for words in (
        knn,
        ["report", str(run_dir)],
        ["sync", str(run_dir)],
        ["doctor", "--run", str(run_dir)],
        ["compare", "--experiment", "moco_dist", "--out", str(tmp_path / "compared")],
    ):
        assert main(words) == 0, words
    assert main(["launch", "local", str(run_dir / "config.yaml"), "--tracking.uri", uri, "--dry-run"]) == 2
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.stop()
    assert main(knn) == 0
    assert main(["sync", str(run_dir)]) == 69
    everything = printed + "".join(capfd.readouterr())
    for path in [*run_dir.rglob("*"), *(tmp_path / "compared").rglob("*")]:
        if path.suffix in (".json", ".jsonl", ".yaml", ".html", ".md", ".csv"):
            everything += path.read_text()
    assert everything.count("View run") >= 2
    assert "hunter2" not in everything
    assert "someone" not in everything


def test_a_server_that_is_killed_and_restarted_during_a_run(server, tmp_path, start):
    """The training neither ends nor waits; it is killed itself while the server is down, and goes on."""
    from mlflow import MlflowClient

    run_dir = tmp_path / "run"
    flags = ["--tracking.backend", "mlflow", "--tracking.uri", server.uri, "--checkpoint.every-steps", "10",
             "--log.every-steps", "2"]  # fmt: skip
    first = start(run_dir, *flags, ranks=1)
    wait_for_step(first, run_dir, 6)
    server.kill()
    said = []
    while not said or "; going on, and keeping what it misses in" not in said[-1]:
        said.append(first.stdout.readline())
        assert said[-1], "".join(said)
    assert "it does not answer" in said[-1]
    wait_for_step(first, run_dir, steps_logged(run_dir) + 6)
    first.kill()
    first.wait()
    before = steps_logged(run_dir)

    second = start(run_dir, *flags, "--run.stop-at-step", str(before + 60), ranks=1)
    wait_for_step(second, run_dir, before + 4)
    server.start()
    output = second.communicate()[0]
    assert second.returncode == 0, output
    if "moco-dist sync" in output:  # it ended within a pause
        assert main(["sync", str(run_dir)]) == 0

    saved = json.loads((run_dir / "mlflow.json").read_text())
    client = MlflowClient(server.uri)
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, before + 61, 2))
    assert _history(client, saved["run_id"], "loss") == [(row["step"], row["loss"]) for row in rows]
    assert client.get_run(saved["run_id"]).info.status == "FINISHED"
    assert len(client.search_runs([saved["experiment_id"]])) == 1
    _has_what_its_page_shows(client, saved["run_id"], run_dir, before + 60, tmp_path)


def _has_what_its_page_shows(client, run_id, run_dir, step, folder):
    """Told while the server was away, at least in part: how far it is, its data set, files, and the weights."""
    run = client.get_run(run_id)
    assert f"\n- how far: step {step:,} of " in run.data.tags["mlflow.note.content"]
    (given,) = run.inputs.dataset_inputs
    assert [path.name for path in run_dir.glob("images_*")] == [f"images_{given.dataset.digest}.txt.gz"]
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.yaml", "views.png", "report"}
    (made,) = run.outputs.model_outputs
    model = client.get_logged_model(made.model_id)
    assert (made.step, str(model.status), model.source_run_id) == (step, "READY", run_id)
    (weights,) = (folder / "server" / "artifacts").rglob("backbone.safetensors")
    assert weights.read_bytes() == (run_dir / "backbone.safetensors").read_bytes()
