"""Pre-training, kNN, linear evaluation and report through the command line, on a few generated images."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moco_dist.cli.main import main
from moco_dist.config.evaluate import KnnConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.datasets.prepare import prepare_shapes
from moco_dist.distributed import told as told_module
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.evaluate import features as features_module
from moco_dist.evaluate import finetune as finetune_module
from moco_dist.evaluate import knn as knn_module
from moco_dist.evaluate import subject as subject_module
from moco_dist.evaluate.during_training import Probe
from moco_dist.evaluate.features import extract
from moco_dist.evaluate.progress import Training
from moco_dist.evaluate.subject import frozen, frozen_encoder, open_evaluation
from moco_dist.files import write_whole
from moco_dist.method.encoder import build_encoder
from moco_dist.report.page import write_report
from moco_dist.run.logbook import read_log
from moco_dist.run.weights import load_trained

TINY = [
    "--data.image-size", "32", "--data.num-workers", "0", "--model.arch", "resnet10",
    "--model.head-hidden-dims", "[16]", "--model.bn-group-size", "4", "--moco.queue-size", "64",
    "--optim.global-batch-size", "8", "--optim.epochs", "1", "--tracking.backend", "none",
]  # fmt: skip
EVALUATION = ["--data.num-workers", "0", "--tracking", "none"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = prepare_shapes(folder / "shapes", num_train=80, num_val=30)
    flags = ["--log.knn-every-epochs", "1", *TINY]
    assert main(["pretrain", "--data.root", str(data), "--run.dir", str(folder / "run"), *flags]) == 0
    return folder / "run"


def written(run_dir, name):
    return json.loads((run_dir / "eval" / f"{name}.json").read_text())


def test_accuracies_during_training_are_logged_and_drawn(run_dir):
    rows = [row for row in read_log(run_dir) if "knn_top1" in row]
    assert [row["step"] for row in rows] == [10]
    for key in ("knn_top1", "probe_top1"):
        assert rows[0][key] * 30 / 100 == pytest.approx(round(rows[0][key] * 30 / 100))  # of 30 images
    assert 1 < rows[0]["rankme"] < 80  # of 80 images
    page = write_report(run_dir).read_text()
    assert "linear probe" in page and "RankMe" in page


def test_the_probe_during_training_sees_the_features_of_the_checkpoint(run_dir):
    """Encoded anew from the saved weights, as `moco-dist knn` does, the features give the same two accuracies."""
    config = read_config(PretrainConfig, run_dir / "config.yaml", [])
    encoder = build_encoder(config.model, 1)
    load_trained(encoder, run_dir)
    row = next(row for row in read_log(run_dir) if "knn_top1" in row)
    assert Probe(config, SimpleNamespace(classes=("a",)), 1, 1, World()).measure(encoder).items() <= row.items()


def test_knn(run_dir, capsys):
    flags = ["--encoders", "[trained, untrained, pixels]", "--neighbours", "[1, 20]", *EVALUATION]
    assert main(["knn", "--run-dir", str(run_dir), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, ("trained", "untrained", "pixels"), strict=True):
        result = written(run_dir, f"knn_{name}")
        assert (result["num_train"], result["num_val"]) == (80, 30)
        assert set(result["accuracy"]) == {"knn_top1_k1", "knn_top1_k20"}
        assert line.startswith(f"{name}: knn_top1_k1 {result['accuracy']['knn_top1_k1']:.2f} %")
    assert written(run_dir, "knn_trained")["step"] == 10


def test_the_commands_temperature_reaches_the_vote(run_dir, monkeypatch):
    given = []
    original = knn_module.knn_accuracy
    monkeypatch.setattr(knn_module, "knn_accuracy", lambda *args: (given.append(args[5]), original(*args))[1])
    words = ["knn", "--run-dir", str(run_dir), "--neighbours", "80", *EVALUATION]
    for temperature in ("0.07", "7"):
        assert main([*words, "--temperature", temperature]) == 0
    assert given == [0.07, 7.0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("total", [1, 7, 8, 21])
def test_every_image_is_encoded_and_counted_once(monkeypatch, world_size, total):
    """Over all ranks: no row is there twice, none is missing, and the total is what there is."""
    monkeypatch.setattr(features_module, "CHUNK_SAMPLES", 4)
    images = SimpleNamespace(paths=list(range(total)), labels=np.arange(total))
    encoder = SimpleNamespace(name="trained", dim=1)

    def encode(evaluation, encoder, folder, parts):
        for part in parts:
            yield torch.tensor([[float(row)] for row in part])

    monkeypatch.setattr(features_module, "_encode", encode)
    shares = []
    for rank in range(world_size):
        evaluation = SimpleNamespace(val=images, world=World(rank, rank, world_size, world_size))
        shares.append(extract(evaluation, encoder, "val", keep=False))
    assert {share.total for share in shares} == {total}
    for values in (torch.cat([share.rows for share in shares]), torch.cat([share.labels for share in shares]),
                   torch.cat([share.values[:, 0] for share in shares])):  # fmt: skip
        assert sorted(values.tolist()) == list(range(total))


def test_fp16_on_a_cpu_is_warned_of(run_dir, capsys):
    open_evaluation(KnnConfig.model_validate({"run_dir": str(run_dir), "precision": "fp16"}), World())
    assert "warning: fp16 on a CPU is many times slower than fp32" in capsys.readouterr().err


def test_report_of_a_run_whose_images_are_elsewhere(run_dir, tmp_path, capsys):
    data = read_config(PretrainConfig, run_dir / "config.yaml", []).data.root
    words = ["knn", "--run-dir", str(run_dir), "--neighbours", "20", *EVALUATION]
    assert main(words) == 0
    moved = data.rename(data.with_name("moved"))
    try:
        capsys.readouterr()
        assert main(["report", str(run_dir)]) == 0
        said = capsys.readouterr()
        assert "warning: no pairs of views: " in said.err
        assert "--data-root says where" in said.err
        page = (run_dir / "report" / "index.html").read_text()
        assert 'id="views"' not in page
        assert page.count("file not found") == 8 * 6
        assert main(["report", str(run_dir), "--data-root", str(moved)]) == 0
        page = (run_dir / "report" / "index.html").read_text()
        assert 'id="views"' in page
        assert "file not found" not in page
    finally:
        moved.rename(data)


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_linear_and_report(run_dir, capsys, features):
    flags = ["--features", features, "--epochs", "2", "--milestones", "[1]", "--global-batch-size", "16", *EVALUATION,
             "--sweep.lrs", "[1, 30]", "--sweep.held-out-share", "0.2"]  # fmt: skip
    assert main(["linear", "--run-dir", str(run_dir), *flags]) == 0
    result = written(run_dir, "linear_trained")
    assert result["accuracy"]["linear_top1"] <= result["accuracy"]["linear_top5"]
    assert [point["epoch"] for point in result["curve"]] == [1, 2]
    assert len(result["per_class"]) == 10
    assert {recipe["lr"] for recipe in result["sweep"]} == {1, 30}
    assert "linear_best_top1" in result["accuracy"]
    capsys.readouterr()
    assert main(["report", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert f"{result['accuracy']['linear_top1']:.2f}" in printed
    assert str(run_dir / "report" / "index.html") in printed


def test_a_part_of_the_labels_and_a_part_of_the_head(run_dir, capsys):
    flags = ["--features", "cached", "--epochs", "1", "--global-batch-size", "8", *EVALUATION,
             "--data.label-fraction", "0.25", "--transfer.keep-head-layers", "1"]  # fmt: skip
    assert main(["linear", "--run-dir", str(run_dir), *flags]) == 0
    assert written(run_dir, "linear_trained_labels0.25_head1")["num_train"] == 20  # 2 of the 8 of each class
    config = KnnConfig.model_validate({"run_dir": str(run_dir), "transfer": {"keep_head_layers": 1}})
    encoder = frozen_encoder(open_evaluation(config, World()), "trained")
    assert encoder.dim == 16  # the first hidden layer's
    views = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert encoder(views).shape == (2, 16)
    assert (encoder(views) >= 0).all()  # after its ReLU
    assert main(["knn", "--run-dir", str(run_dir), "--transfer.keep-head-layers", "3", *EVALUATION]) == 2
    assert "has 2 layer(s); 0 to 2 can be kept" in capsys.readouterr().err


FINETUNE = ["--epochs", "2", "--milestones", "[1]", "--global-batch-size", "16", *EVALUATION]


def test_finetune_and_report(run_dir, capsys):
    assert main(["finetune", "--run-dir", str(run_dir), "--encoders", "[trained, untrained]", *FINETUNE]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, ("trained", "untrained"), strict=True):
        result = written(run_dir, f"finetune_{name}")
        assert line.startswith(f"{name}: finetune_top1 {result['accuracy']['finetune_top1']:.2f} %")
        assert result["accuracy"]["finetune_top1"] <= result["accuracy"]["finetune_top5"]
        assert [point["epoch"] for point in result["curve"]] == [1, 2]
        assert all("top1" in point for point in result["curve"])
        assert (len(result["per_class"]), result["num_train"], result["num_val"]) == (10, 80, 30)
    assert written(run_dir, "finetune_trained")["step"] == 10
    assert list((run_dir / "eval").glob(".finetune*")) == []
    assert main(["report", str(run_dir)]) == 0
    assert "fine-tuning top-1 %" in capsys.readouterr().out
    assert "fine-tuning: top-1, %" in (run_dir / "report" / "index.html").read_text()


def test_finetune_with_a_quarter_of_the_labels_and_a_layer_of_the_head(run_dir, capsys):
    flags = [*FINETUNE, "--data.label-fraction", "0.25", "--transfer.keep-head-layers", "1"]
    assert main(["finetune", "--run-dir", str(run_dir), *flags]) == 0
    assert written(run_dir, "finetune_trained_labels0.25_head1")["num_train"] == 20
    assert main(["report", str(run_dir)]) == 0
    assert "fine-tuning, 25 % of labels, 1 layer(s) of the head top-1 %" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch):
    """Asks this process to stop, as a scheduler does, when so much was told of; returns what is told of."""

    def ask(nth):
        original, calls = Told.add, []

        def asking(self, count=1, note=""):
            calls.extend([(self._what, count)] if self._total else [])  # not of a folder's list: it has no total
            if self._total and len(calls) == nth:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # a thread hears it
            return original(self, count, note)

        monkeypatch.setattr(Told, "add", asking)
        return calls

    return ask


TRAININGS = {
    "finetune": [*FINETUNE, "--epochs", "3"],
    "cached": ["--features", "cached", "--epochs", "3", "--global-batch-size", "16", *EVALUATION],
    "augmented": ["--epochs", "3", "--global-batch-size", "16", "--sweep.lrs", "[1, 30]", *EVALUATION],
}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("step", [2, 5, 15])
def test_a_training_goes_on_at_the_step_where_it_was_stopped(run_dir, capsys, monkeypatch, asked, training, step):
    """In the middle of an epoch of five steps, at its end, and at the last one; then the same to the last bit."""
    command = "finetune" if training == "finetune" else "linear"
    words = [command, "--run-dir", str(run_dir), *TRAININGS[training], "--seed", "5"]
    assert main(words) == 0
    expected = written(run_dir, f"{command}_trained")
    original, steps = Training.add, []

    def counted(self, loss):
        steps.append(loss)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        original(self, loss)

    monkeypatch.setattr(Training, "add", counted)
    assert main(words) == 75
    assert f"stopped: saved at step {step}; run the same command to go on" in capsys.readouterr().err
    assert main(words) == 0
    assert len(steps) == 15
    found = written(run_dir, f"{command}_trained")
    for key in ("curve", "accuracy", "per_class"):
        assert found[key] == expected[key]
    assert not list((run_dir / "eval").glob(f".{command}*"))


def test_encoding_goes_on_at_the_image_where_it_was_stopped(run_dir, tmp_path, capsys, asked):
    """Batches of 20, as 80 and 30 images: 40 are encoded when it is asked, then the rest."""
    shutil.copytree(run_dir, tmp_path / "run", ignore=lambda *_: ["features"])
    words = ["knn", "--run-dir", str(tmp_path / "run"), "--neighbours", "20", "--data.batch-size", "20", *EVALUATION]
    asked(2)
    assert main(words) == 75
    assert "stopped: 40 of 80 features of train are encoded; run the same command" in capsys.readouterr().err
    encoded = asked(-1)
    assert main(words) == 0
    assert encoded == [("trained features, train", 20)] * 2 + [("trained features, val", n) for n in (20, 10)] + [
        ("kNN", 30)]  # fmt: skip
    again = written(tmp_path / "run", "knn_trained")["accuracy"]
    shutil.rmtree(tmp_path / "run" / "eval" / "features")
    assert main(words) == 0
    assert written(tmp_path / "run", "knn_trained")["accuracy"] == again


def test_a_result_that_cannot_be_written_costs_no_training(run_dir, monkeypatch):
    """A disk that is full at the end: the training is still there."""
    words = ["finetune", "--run-dir", str(run_dir), *FINETUNE, "--seed", "9"]
    with monkeypatch.context() as patch:
        patch.setattr(subject_module, "write_result", lambda *args, **more: write_whole(tmp_full / "x", b""))
        tmp_full = run_dir / "config.yaml"  # not a folder
        assert main(words) == 74
    assert len(list((run_dir / "eval").glob(".finetune*"))) == 1
    epochs = []
    original = finetune_module._epoch
    monkeypatch.setattr(finetune_module, "_epoch", lambda *args: (epochs.append(args), original(*args)))
    assert main(words) == 0
    assert epochs == []
    assert not list((run_dir / "eval").glob(".finetune*"))


def test_a_sweep_without_an_image_to_choose_by_is_refused_at_once(run_dir, capsys):
    """A tenth of eight images of a class is one, which trains."""
    words = ["linear", "--run-dir", str(run_dir), "--data.label-fraction", "0.1", "--sweep.lrs", "[1, 10]"]
    assert main([*words, "--epochs", "1", *EVALUATION]) == 2
    assert "no class has two or more; use more labels, or leave the sweep out" in capsys.readouterr().err
    words = ["linear", "--run-dir", str(run_dir), "--data.label-fraction", "0.1", "--epochs", "1", *EVALUATION]
    assert main(words) == 0


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(told_module, "TELL_SECONDS", 0.01)
    with Told("detector", 1000, "steps", World(), 10) as told:
        wait_for(lambda: "detector: 10 of 1,000 steps  begun 0:00:00 ago" in capsys.readouterr().err)
        told.add(5, "loss 2.5")
        wait_for(lambda: "detector: 15 of 1,000 steps  loss 2.5  0:0" in capsys.readouterr().err)
    capsys.readouterr()
    with Told("detector", 1000, "steps", World(1, 1, 2, 2)):  # rank 0 alone speaks
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def wait_for(is_so):
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_finetune_goes_on_after_the_last_whole_epoch(run_dir, monkeypatch):
    """An interruption in the second epoch; then the same curve and accuracy as without it."""
    flags = ["finetune", "--run-dir", str(run_dir), *FINETUNE, "--epochs", "3", "--seed", "5"]
    assert main(flags) == 0
    expected = written(run_dir, "finetune_trained")
    trained = []
    epoch_of = finetune_module._epoch

    def interrupted(*args):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(args[-1])
        return epoch_of(*args)

    monkeypatch.setattr(finetune_module, "_epoch", interrupted)
    assert main(flags) == 130
    monkeypatch.setattr(finetune_module, "_epoch", lambda *args: (trained.append(args[-1]), epoch_of(*args))[1])
    assert main(flags) == 0
    assert trained == [0, 1, 2]
    found = written(run_dir, "finetune_trained")
    assert (found["curve"], found["accuracy"]) == (expected["curve"], expected["accuracy"])


def test_batches_of_finetune_are_whole_bn_groups(run_dir, capsys):
    words = ["finetune", "--run-dir", str(run_dir), *EVALUATION]
    assert main([*words, "--global-batch-size", "18"]) == 2
    assert "global_batch_size 18 is not a multiple of 4 = 1 rank(s) x BN groups of 4; 16 and 20 are" in (
        capsys.readouterr().err
    )
    assert main([*words, "--data.max-train-samples", "3"]) == 2
    assert "3 training images are less than a BN group of 4 on each of 1 rank(s)" in capsys.readouterr().err
    assert main([*words, "--encoders", "pixels"]) == 2
    assert "encoders" in capsys.readouterr().err


def test_features_that_are_there_are_not_encoded_again(run_dir, monkeypatch):
    monkeypatch.setattr(features_module, "CHUNK_SAMPLES", 32)
    config = KnnConfig.model_validate({"run_dir": str(run_dir), "data": {"num_workers": 0}})
    evaluation = open_evaluation(config, World())
    encoder = frozen_encoder(evaluation, "trained")
    encoded = []
    original = features_module._encode

    def counted(evaluation, encoder, folder, chunks):
        encoded.extend(chunks)
        return original(evaluation, encoder, folder, chunks)

    monkeypatch.setattr(features_module, "_encode", counted)
    first = extract(evaluation, encoder, "train")
    assert encoded == [range(0, 32), range(32, 64), range(64, 80)]
    chunks = [p for p in run_dir.glob("eval/features/*/000000032.safetensors")]
    assert len(chunks) == 1
    chunks[0].write_bytes(chunks[0].read_bytes()[:100])  # as an interruption, or a bad disk, leaves it
    encoded.clear()
    again = extract(evaluation, encoder, "train")
    assert encoded == [range(32, 64)]
    assert torch.equal(first.values, again.values)


def test_a_backbone_that_changes_is_noticed(run_dir):
    config = KnnConfig.model_validate({"run_dir": str(run_dir), "data": {"num_workers": 0}})
    encoder = frozen_encoder(open_evaluation(config, World()), "trained")
    with pytest.raises(RuntimeError, match="trained encoder changed"), frozen(encoder):
        next(encoder.module.buffers()).add_(1e-3)


@pytest.mark.parametrize("command", ["knn", "linear", "finetune"])
def test_mistakes_are_one_line(run_dir, tmp_path, capsys, command):
    assert main([command, "--run-dir", str(tmp_path), *EVALUATION]) == 2
    assert f"error: run_dir {tmp_path} is not the folder of a run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    k = ["--neighbours", "[20]"] if command == "knn" else []
    assert main([command, "--run-dir", str(tmp_path), *k, *EVALUATION]) == 2
    assert "has no complete checkpoint; pre-train first" in capsys.readouterr().err
    assert main([command, "--run-dir", str(run_dir), "--data.root", str(run_dir), *EVALUATION]) == 2
    assert capsys.readouterr().err.count("\n") == 1
