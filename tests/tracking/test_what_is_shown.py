"""What MLflow's pages show of a run beside its numbers: description, data set, accuracies, pictures and the model."""

import json
import threading

import pytest

from moco_dist.config.evaluate import KnnConfig
from moco_dist.data.sources import find_training_images
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.report import while_training
from moco_dist.report.while_training import Showing
from moco_dist.tracking import Tracker
from moco_dist.tracking.remote import with_lines
from tests.tracking.records import client_for, config_of, record_of, run_of

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's own
STEPS_PER_EPOCH, TOTAL_STEPS = 5, 1000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("MoCo.", "MoCo.\n\n- how far: step 2\n- kNN: 3 %"),
        ("MoCo.\n\n- how far: step 1\n", "MoCo.\n\n- how far: step 2\n- kNN: 3 %"),
        ("- kNN: 1 %\nmine: - how far: yes\n", "- kNN: 3 %\nmine: - how far: yes\n\n- how far: step 2"),
    ],
)
def test_a_line_of_the_description_stands_in_the_place_of_an_older_one(before, after):
    """What a person has written stays, and the same told again changes nothing: it may be sent twice."""
    lines = {"how far": "step 2", "kNN": "3 %"}
    assert with_lines(before, lines) == after
    assert with_lines(after, lines) == after


def test_the_pretrainings_run_has_what_mlflows_pages_show(runs):
    """Its user, source, description and kind of experiment; the accuracies of the trained encoder, and of no other."""
    with Tracker.for_pretraining(config_of(runs / "a", experiment="fresh"), World()):
        pass
    for encoder, top1 in (("trained", 67.5), ("untrained", 20.0)):
        with Tracker.for_evaluation(KnnConfig(run_dir=runs / "a"), "knn", encoder) as tracker:
            tracker.log_metrics(9, {"knn_top1_k20": top1, "knn_top1_k5": top1})
    with Tracker.for_pretraining(config_of(runs / "a", experiment="fresh"), World()):  # what was added stays
        pass
    run = run_of(runs / "a")
    assert run.data.metrics == {"knn_top1_k20": 67.5}
    assert run.data.tags["mlflow.source.name"] == "moco-dist pretrain"
    assert run.data.tags["mlflow.user"]
    description = run.data.tags["mlflow.note.content"]
    assert description.startswith("MoCo, resnet50, 200 epochs of `photos`")
    assert description.endswith("\n- knn_top1_k20: 67.50 % at step 9")
    tags = client_for(runs).get_experiment(run.info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.fixture
def tracked(runs, tiny_data):
    """A run's config over real images, with its folder as a pre-training has it, in an experiment of its own."""
    config = config_of(runs / "a", experiment="shown")
    data = config.data.model_copy(update={"root": tiny_data, "num_workers": 0, "image_size": 32})
    (runs / "a").mkdir()
    (runs / "a" / "config.yaml").write_text(f"data: {{root: {tiny_data}}}\nrun: {{dir: {runs / 'a'}}}\n")
    (runs / "a" / "backbone.safetensors").write_bytes(b"weights")
    return config.model_copy(update={"data": data})


def show(config, tracker, said):
    images = find_training_images(config.data)
    showing = Showing(config, images, tracker, STEPS_PER_EPOCH, TOTAL_STEPS, said.append)
    showing.reached(500)
    showing.finish(500)
    showing.close()
    return images


def test_a_run_shows_its_settings_data_set_views_report_and_model(tracked, runs):
    said = []
    with Tracker.for_pretraining(tracked, World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0, "knn_top1": 40.0, "probe_top1": 50.0})
        images = show(tracked, tracker, said)
    assert said == []
    begin = json.loads((runs / "a" / "mlflow" / "pretrain.jsonl").read_text().splitlines()[0])
    assert run_of(runs / "a").info.start_time == begin["time_ms"]  # not when a server was first told
    run, client, run_id = run_of(runs / "a"), client_for(runs), record_of(runs / "a")["run_id"]
    description = run.data.tags["mlflow.note.content"]
    assert "- kNN during training: 40.00 % at step 1\n- linear probe during training: 50.00 % at step 1" in description
    assert "- how far: step 500 of 1,000, epoch 100.0 of 200" in description
    assert f"- to go on: `moco-dist pretrain {runs}/a/config.yaml`" in description
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == tracked.data.root.name
    assert given.dataset.digest == images.list_hash[:16]
    assert images.list_hash in given.dataset.profile
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.yaml", "views.png", "report"}
    assert [file.path for file in client.list_artifacts(run_id, "report")] == ["report/index.html"]
    assert (runs / "a" / "report" / "index.html").read_text().count("query view of sample") == while_training.PAIRS
    (made,) = run.outputs.model_outputs
    model = client.get_logged_model(made.model_id)
    assert (model.name, str(model.status), model.source_run_id) == (while_training.MODEL, "READY", run_id)
    assert model.params["arch"] == "resnet50"
    (file,) = (runs / "mlflow-artifacts").rglob("backbone.safetensors")
    assert file.read_bytes() == b"weights"


def test_a_model_that_is_sent_twice_is_one(tracked, runs, capsys):
    """As where a run that has come to its end is started again."""
    with Tracker.for_pretraining(tracked, World()) as tracker:
        show(tracked, tracker, [])
    sent = runs / "a" / "mlflow.json"
    sent.write_text(sent.read_text().replace(f'"sent_bytes": {record_of(runs / "a")["sent_bytes"]}', '"sent_bytes": 0'))
    capsys.readouterr()
    with Tracker.for_pretraining(tracked, World()):
        pass
    assert "left out" not in capsys.readouterr().err
    run = run_of(runs / "a")
    assert len(client_for(runs).search_logged_models([run.info.experiment_id])) == 1
    assert len(run.inputs.dataset_inputs) == len(run.outputs.model_outputs) == 1


def test_a_server_without_logged_models_gets_the_backbone_as_an_artifact(tracked, runs, monkeypatch):
    """It answers 404, as those before MLflow 3 do."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    def unknown(*_, **__):
        raise MlflowException("failed with error code 404", ENDPOINT_NOT_FOUND)

    with monkeypatch.context() as old:
        old.setattr(mlflow.MlflowClient, "search_logged_models", unknown)
        with Tracker.for_pretraining(tracked, World()) as tracker:
            show(tracked, tracker, [])
    (file,) = client_for(runs).list_artifacts(record_of(runs / "a")["run_id"], while_training.MODEL)
    assert file.path == f"{while_training.MODEL}/backbone.safetensors"
    assert run_of(runs / "a").info.status == "FINISHED"


def test_a_picture_that_cannot_be_made_is_told_and_hurts_nothing(tracked, runs, monkeypatch):
    def refuse(config, count, index_folder):
        indices.append(index_folder)
        raise UserError("no image can be read")

    said, indices = [], []
    monkeypatch.setattr(while_training, "view_pairs", refuse)
    with Tracker.for_pretraining(tracked, World()) as tracker:
        show(tracked, tracker, said)
    assert said == ["note: no picture of the run for MLflow: no image can be read; training goes on"]
    assert indices == [tracked.run.dir / "index"]  # or headers in a store would be read once more
    assert {file.path for file in client_for(runs).list_artifacts(record_of(runs / "a")["run_id"])} == {
        "config.yaml", "report",
    }  # fmt: skip


def test_the_page_is_made_anew_with_growing_pauses_and_by_a_thread(tracked, monkeypatch):
    """Never two at once: the training goes on while one is being made."""
    made, may_end, clock = [], threading.Event(), [0.0]
    monkeypatch.setattr(while_training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(while_training, "view_pairs", lambda *_: (_ for _ in ()).throw(UserError("none")))
    monkeypatch.setattr(
        while_training, "write_report", lambda *_: (made.append(clock[0]), may_end.wait(60), tracked.run.dir)[-1]
    )
    with Tracker.for_pretraining(tracked, World()) as tracker:
        showing = Showing(tracked, find_training_images(tracked.data), tracker, 5, 1000, lambda _: None)
        showing._is_making(60)
        for clock[0] in (15.0, 31.0, 65.0):  # the second is due, the third too, but the second is still being made
            showing.logged()
        may_end.set()
        showing._is_making(60)
        for clock[0] in (92.0, 100.0, 213.0):
            showing.logged()
            showing._is_making(60)
    assert made == [31.0, 92.0, 213.0]
