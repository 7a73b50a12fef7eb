"""`moco-dist detect` on a few generated images: a tiny backbone, a result, and no claim about accuracy."""

import functools
import json
import os
import signal
import time

import pytest
import torch

from moco_dist.cli.main import main
from moco_dist.config.evaluate import DetectConfig
from moco_dist.config.pretrain import AugmentConfig, ModelConfig
from moco_dist.distributed.world import World
from moco_dist.errors import Preempted
from moco_dist.evaluate.detection import detector as detector_module
from moco_dist.evaluate.detection import run as detection_run
from moco_dist.evaluate.detection.detector import build_detector, weight_groups
from moco_dist.evaluate.detection.run import learning_rate, run_detection
from moco_dist.evaluate.detection.voc import Pictures, read_sets
from moco_dist.method.encoder import build_encoder
from moco_dist.run.weights import read_backbone
from tests.voc import CLASSES, make_voc
from tests.world import on_two_hosts, run

STEPS = 4


@pytest.fixture(autouse=True)
def small_regions(monkeypatch):
    """2 x 2 cells of a region instead of 14 x 14: layer4 on a thousand regions is nearly all of the time."""
    monkeypatch.setattr(detector_module, "REGION_CELLS", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """VOC's folders, and the weights of an untrained ResNet-10 as another program would leave them."""
    top = tmp_path_factory.mktemp("detect")
    make_voc(top / "voc")
    torch.save(build_encoder(ModelConfig(arch="resnet10"), 0).backbone.state_dict(), top / "backbone.pth")
    return top


def settings(folder, **more):
    return {
        "weights": folder / "backbone.pth", "arch": "resnet10", "steps": STEPS, "global_batch_size": 2,
        "warmup_steps": 2, "milestones": [3], "short_sides": [48, 64], "tracking": "none", "device": "cpu",
        "data": {"root": folder / "voc", "train_sets": ["trainval"], "test_sets": ["test"], "classes": CLASSES,
                 "num_workers": 0}, **more,
    }  # fmt: skip


def config_of(folder, **more):
    return DetectConfig.model_validate(settings(folder, **more))


def words_of(folder, *more):
    flags = settings(folder)
    flags |= {f"data.{name}": value for name, value in flags.pop("data").items()}
    words = ["detect"]
    for name, value in flags.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, list | tuple) else str(value)]
    return [*words, *more]


def test_the_detector_is_r50_c4(folder):
    config = config_of(folder)
    backbone = read_backbone(config.weights, "resnet10")
    detector = build_detector(backbone, config, AugmentConfig(), World())
    for name in ("conv1.weight", "layer3.0.bn1.running_mean"):
        assert torch.equal(detector.backbone.state_dict()[name], backbone.tensors[name])
    assert torch.equal(detector.roi_heads.box_head.layer4[0].conv1.weight, backbone.tensors["layer4.0.conv1.weight"])
    detector.eval()
    with torch.no_grad():
        assert detector.backbone(torch.zeros(1, 3, 64, 96)).shape == (1, 256, 4, 6)  # stride 16
        assert detector.roi_heads.box_head(torch.zeros(5, 256, 14, 14)).shape == (5, 512)
    assert detector.rpn.anchor_generator.num_anchors_per_location() == [15]
    decayed, norms = (group["params"] for group in weight_groups(detector, 1e-4))
    assert len(decayed) + len(norms) == len(list(detector.parameters()))
    assert all(p.ndim == 1 for p in norms)


def test_the_rate_warms_up_and_falls(folder):
    config = config_of(folder, warmup_steps=100, milestones=[200, 300])
    assert learning_rate(config, 0) == pytest.approx(0.02 / 1000)
    assert learning_rate(config, 50) == pytest.approx(0.02 * 0.5005)
    assert [learning_rate(config, step) for step in (100, 200, 300)] == pytest.approx([0.02, 0.002, 0.0002])


def test_the_command(folder, capsys):
    assert main(words_of(folder)) == 0
    result = json.loads((folder / "backbone.pth.detection.json").read_text())
    ap50, ap, ap75 = (result["accuracy"][f"detection_{name}"] for name in ("ap50", "ap", "ap75"))
    assert capsys.readouterr().out == f"AP50 {ap50:.2f}  AP {ap:.2f}  AP75 {ap75:.2f} %, on 5 images\n"
    assert 0 <= ap75 <= ap50 <= 100
    assert (result["num_train"], result["num_test"]) == (8, 5)
    assert set(result["ap50_per_class"]) == set(CLASSES)
    assert [point["step"] for point in result["curve"]] == [STEPS]
    assert not list(folder.glob(".*.safetensors"))


def test_the_backbone_of_a_run(folder, tmp_path, capsys):
    run_dir, data = tmp_path / "run", folder / "voc"
    file = str(folder / "backbone.pth")
    words = ["import", file, "--arch", "resnet10", "--data-root", str(data), "--out", str(run_dir)]
    assert main(words) == 0
    words = words_of(folder, "--steps", "1")
    i = words.index("--weights")
    assert main([*words[:i], "--run-dir", str(run_dir), *words[i + 2 :]]) == 0
    assert "on 5 images" in capsys.readouterr().out
    assert json.loads((run_dir / "eval" / "detection.json").read_text())["config"]["steps"] == 1


def counted(found, name, read, *args):
    found.append(name)
    return read(*args)


def reads(world, folder):
    """What this rank of two hosts has read before the training begins."""
    found = []
    for name in ("read_sets", "_backbone"):
        setattr(detection_run, name, functools.partial(counted, found, name, getattr(detection_run, name)))

    def begins(backbone, *_):
        assert len(backbone.tensors) > 50
        raise Preempted("enough")

    detection_run.build_detector = begins
    with pytest.raises(Preempted):
        run_detection(config_of(folder, global_batch_size=4), on_two_hosts(world))
    return found


def test_lists_are_read_once_a_host_and_weights_once(folder):
    sets = ["read_sets"] * 2
    assert run(reads, 4, folder) == [["_backbone", *sets], [], sets, []]


@pytest.fixture
def asked(monkeypatch):
    """Asks this process to stop, as a scheduler does, when a function is called for the nth time."""

    def ask(module, name, nth):
        original, calls = getattr(module, name), []

        def asking(*args, **more):
            if "annotations" in getattr(args[0], "_what", ""):  # are read: nothing is kept yet
                return original(*args, **more)
            calls.append(args)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # a thread hears it
            return original(*args, **more)

        monkeypatch.setattr(module, name, asking)
        return calls

    return ask


def trained(folder, monkeypatch):
    """What a training came to, and its weights at the test."""
    monkeypatch.setattr(detection_run, "CURVE_STEPS", 2)
    seen = []

    def found(detector, *args):
        seen.append({name: value.clone() for name, value in detector.state_dict().items()})
        return original(detector, *args)

    original = detection_run._detections
    with monkeypatch.context() as patch:
        patch.setattr(detection_run, "_detections", found)
        result = run_detection(config_of(folder), World())
    return result, seen[0]


@pytest.mark.parametrize("step", [1, 2, 3, STEPS])
def test_it_goes_on_at_the_step_where_it_was_stopped(folder, monkeypatch, asked, step):
    whole, weights = trained(folder, monkeypatch)
    asked(detection_run, "_flipped", step)
    with pytest.raises(Preempted, match=f"saved at step {step};"):
        trained(folder, monkeypatch)
    assert len(list(folder.glob(".backbone.pth.detection.json_*.safetensors"))) == 1
    steps = asked(detection_run, "_flipped", -1)
    resumed, weights_resumed = trained(folder, monkeypatch)
    assert len(steps) == STEPS - step
    assert (resumed["curve"], resumed["accuracy"]) == (whole["curve"], whole["accuracy"])
    assert all(torch.equal(value, weights_resumed[name]) for name, value in weights.items())
    assert [point["step"] for point in whole["curve"]] == [2, 4]
    assert not list(folder.glob(".*.safetensors"))


def test_the_test_goes_on_at_the_image_where_it_was_stopped(folder, monkeypatch, asked):
    """Two images at once of five; it is asked while it takes the second two."""
    whole, _ = trained(folder, monkeypatch)
    asked(detection_run.Told, "add", STEPS + 2)
    with pytest.raises(Preempted, match="4 of 5 test images are done"):
        trained(folder, monkeypatch)
    batches = asked(detection_run.Told, "add", -1)
    resumed, _ = trained(folder, monkeypatch)
    assert len(batches) == 1
    assert resumed["accuracy"] == whole["accuracy"]
    assert not list(folder.glob(".*.safetensors"))


def of_rank(world, folder):
    detection_run.CURVE_STEPS, detector_module.REGION_CELLS = 1, 2
    seen = []
    original = detection_run.average_precision

    def looked_at(truth, detections, num_classes):
        seen.append(detections)
        return original(truth, detections, num_classes)

    detection_run.average_precision = looked_at
    result = run_detection(config_of(folder), world)
    return result["curve"], result["accuracy"], seen[0]


@pytest.mark.slow
def test_ranks_agree(folder):
    (curve, accuracy, found), (other_curve, other_accuracy, other_found) = run(of_rank, 2, folder)
    assert curve == other_curve
    assert accuracy == other_accuracy
    assert (found == other_found).all()
    assert set(found[:, 0]) <= set(range(5))
    config = json.loads((folder / "backbone.pth.detection.json").read_text())["config"]
    assert config["global_batch_size"] == 2


def test_a_mirrored_image_has_mirrored_boxes(folder):
    items = read_sets(folder / "voc", ["trainval"], CLASSES)
    torch.manual_seed(0)
    images, targets = detection_run._flipped([Pictures(items)[0]] * 20, items, "cpu")
    lefts = {target["boxes"][0, 0].item() for target in targets}
    assert lefts == {0.0, 44.0}  # of 64 pixels, a box of 20
    for picture, target in zip(images, targets, strict=True):
        left, top, right, bottom = target["boxes"][0].int().tolist()
        assert picture[0, top:bottom, left:right].mean() > 0.9  # it is red
        assert target["labels"].tolist() == [1, 2, 1]


def test_gradients_are_averaged():
    assert run(shared_gradients, 2) == [(1.5, [3.0, 3.0], [0.5])] * 2


def shared_gradients(world):
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.full((1, 2), 2.0 + 2 * world.rank)
    layer.bias.grad = torch.tensor([float(world.rank)])
    loss = detection_run._share_gradients(layer, torch.tensor(1.0 + world.rank), world)
    return loss.item(), layer.weight.grad[0].tolist(), layer.bias.grad.tolist()


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    cases = [
        (words_of(folder, "--run-dir", str(tmp_path)), "give either run_dir"),
        (words_of(folder, "--data.classes", "[cat, dgo]"), "has the class 'dog', which is not one of data.classes"),
        (words_of(folder, "--global-batch-size", "16"), "trainval: 8 images, less than one batch"),
        (words_of(folder, "--weights", str(tmp_path / "no.pth")), "is not a file"),
        (words_of(folder, "--arch", "resnet18"), "resnet18"),
        (words_of(folder, "--data.test-sets", "[tset]"), "did you mean test?"),
        (words_of(folder, "--data.root", str(tmp_path)), "does not exist"),
    ]
    for words, says in cases:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert says in error, error
        assert error.count("\n") == 1, error


def test_a_damaged_image_is_named_by_a_worker_too(folder, tmp_path, capsys):
    voc = make_voc(tmp_path / "voc")
    for file in (voc / "JPEGImages").iterdir():
        file.write_bytes(b"")
    assert main(words_of(folder, "--data.root", str(voc), "--data.num-workers", "1")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot read image")
    assert error.count("\n") == 1, error
