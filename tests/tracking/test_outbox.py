"""What a server misses is kept beside the run and delivered once, in its order, by the run or by `moco-dist sync`."""

import json
import threading

import pytest

from moco_dist.cli.main import main
from moco_dist.config.evaluate import KnnConfig
from moco_dist.distributed.world import World
from moco_dist.tracking import Tracker, ui_command
from moco_dist.tracking.outbox import Outbox
from tests.tracking.records import client_for, config_of, history_of, record_of, run_of, wait_until_sent

pytest.importorskip("mlflow")
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own
SECRET_URI = "http://someone:hunter2@127.0.0.1:1"


def test_a_step_does_not_wait_and_order_is_kept(runs, monkeypatch):
    from mlflow import MlflowClient

    log_batch, released = MlflowClient.log_batch, threading.Event()

    def slow(*args, **kwargs):
        assert released.wait(60)
        log_batch(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        for step in range(5):
            tracker.log_metrics(step, {"loss": step})
        assert record_of(runs / "a")["run_id"] == ""  # the server has nothing yet, and we are here
        released.set()
    assert history_of(runs / "a", "loss") == [(step, step) for step in range(5)]


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
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        for step in range(9):
            tracker.log_metrics(step, {"loss": step})
        wait_until_sent(tracker)
    first, second = capsys.readouterr().err.splitlines()
    assert "no way to http://127.0.0.1:1/api. And more; going on, and keeping what it misses in" in first
    assert "answers again" in second
    assert history_of(runs / "a", "loss") == [(step, step) for step in range(9)]
    assert run_of(runs / "a").info.status == "FINISHED"


def test_steps_that_are_done_again_are_not_told_again(runs):
    """Killed at step 50 with a checkpoint at 30, and on another number of ranks the numbers differ a little."""
    with pytest.raises(ValueError, match="killed"), Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        for step in range(10, 60, 10):
            tracker.log_metrics(step, {"loss": 1 / step})
        tracker.log_metrics(40, {"knn_top1": 5.0})
        raise ValueError("killed")
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        for step in range(40, 80, 10):
            tracker.log_metrics(step, {"loss": 1 / step + 1e-9})
            tracker.log_metrics(step, {"knn_top1": 5.0})
    expected = [(step, 1 / step + (1e-9 if step > 50 else 0)) for step in range(10, 80, 10)]
    assert history_of(runs / "a", "loss") == expected
    assert [step for step, _ in history_of(runs / "a", "knn_top1")] == [40, 50, 60, 70]


def test_what_is_refused_for_good_does_not_hold_up_the_rest(runs, capsys):
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 1.0})
        tracker.log_metrics(2, {"lo*ss": 1.0})
        tracker.log_metrics(3, {"loss": 3.0})
    assert history_of(runs / "a", "loss") == [(1, 1.0), (3, 3.0)]
    assert "left out, since MLflow refuses it" in capsys.readouterr().err


def test_a_server_that_is_never_there_and_a_sync_later(runs, tmp_path, monkeypatch, capsys):
    """A whole run, resumed once, an evaluation and a report; then the database is where the server should have been."""
    monkeypatch.chdir(tmp_path)  # where MLflow puts what a server would have taken
    run_dir = runs / "a"
    page = tmp_path / "index.html"
    page.write_text("page")
    config = config_of(run_dir, uri=SECRET_URI, experiment="late")
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

    saved = record_of(run_dir) | {"tracking_uri": f"sqlite:///{runs / 'mlflow.db'}"}
    (run_dir / "mlflow.json").write_text(json.dumps(saved))
    for _ in range(2):  # the second finds nothing to do
        assert main(["sync", str(run_dir)]) == 0
        run = run_of(run_dir)
        assert run.info.status == "FINISHED"
        assert run.data.params["optim.base_lr"] == "0.03"
        assert history_of(run_dir, "loss") == [(1, 3.0), (2, 1.7976931348623157e308)]  # as MLflow keeps infinity
        query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        (child,) = client_for(runs).search_runs([run.info.experiment_id], query)
        assert child.data.metrics == {"knn_top1": 12.5}
    assert "all was delivered before" in capsys.readouterr().out
    assert [path.name for path in (run_dir / "mlflow").iterdir()] == ["pretrain.jsonl"]


def test_a_journal_that_another_process_sends_is_left_to_it(runs, capsys):
    with Tracker.for_pretraining(config_of(runs / "a"), World()):
        assert main(["sync", str(runs / "a")]) == 0
    assert "pretrain.jsonl is being delivered by another process" in capsys.readouterr().out


def test_a_run_that_is_gone_in_mid_training_begins_anew_with_all_of_it(runs, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    log_batch, gone = MlflowClient.log_batch, []

    def of_those_there(self, run_id, *args, **more):
        if run_id in gone:
            raise MlflowException(f"Run with id={run_id} not found", RESOURCE_DOES_NOT_EXIST)
        log_batch(self, run_id, *args, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", of_those_there)
    monkeypatch.setattr(Outbox, "_wait", lambda *_: None)
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})
        wait_until_sent(tracker)
        gone.append(record_of(runs / "a")["run_id"])
        client_for(runs).delete_run(gone[0])
        tracker.log_metrics(2, {"loss": 2.0})
        wait_until_sent(tracker)
    assert record_of(runs / "a")["run_id"] not in gone
    assert history_of(runs / "a", "loss") == [(1, 3.0), (2, 2.0)]


def test_what_is_sent_at_once_is_no_more_than_mlflow_takes(runs, monkeypatch):
    """More would be refused, and then sent one by one."""
    from mlflow import MlflowClient

    log_batch, sizes, released = MlflowClient.log_batch, [], threading.Event()

    def counted(self, run_id, metrics=(), **more):
        assert released.wait(60)
        sizes.append(len(metrics))
        log_batch(self, run_id, metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    with Tracker.for_pretraining(config_of(runs / "a"), World()) as tracker:
        for step in range(1, 61):
            tracker.log_metrics(step, {f"metric_{i}": 1.0 for i in range(20)})
        released.set()
        wait_until_sent(tracker)
    assert sum(sizes) == 1200
    assert max(sizes) <= 1000
    assert len(sizes) < 6
