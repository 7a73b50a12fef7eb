"""data.root was there and is gone: renamed, or its disk is not mounted. Only what knew it ends with 74."""

import shutil

import pytest
import torch
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.config.pretrain import ModelConfig, PretrainConfig
from moco_dist.config.source import to_yaml
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_IO, EXIT_MISTAKE, InfrastructureError
from moco_dist.method.encoder import build_encoder
from tests.voc import make_voc


def renamed(root):
    root.rename(root.with_name("elsewhere" + root.suffix))


def unmounted(root):
    if root.is_dir():
        shutil.rmtree(root)
        root.mkdir()
    else:
        root.unlink()


def without_train(root):
    (root / "train").rename(root / "trian")
    (root / "val").mkdir(exist_ok=True)


def train_unmounted(root):
    unmounted(root / "train")


def without_val(root):
    shutil.rmtree(root / "val")


@pytest.fixture
def images(tmp_path):
    for i in range(8):
        path = tmp_path / "images" / "train" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 70), (i, 0, 0)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("on_error", ["fail", "skip-and-report"])
@pytest.mark.parametrize("harm", [renamed, unmounted])
def test_in_mid_run(images, loader, harm, on_error, waits):
    root = pack(images, images.with_suffix(".beton")) if loader == "ffcv" else images
    config = PretrainConfig.model_validate({
        "run": {"dir": "unused"}, "model": {"bn_group_size": 2}, "optim": {"global_batch_size": 8},
        "data": {"root": root, "loader": loader, "image_size": 32, "num_workers": 0, "on_error": on_error},
    })  # fmt: skip
    batches = pretrain_batches(find_images(root, "train"), config, Plan(8, 8, 0), World(), 0, 1)
    harm(root)
    with pytest.raises(InfrastructureError, match=rf"{root}.* is gone, .*: cannot read image .*\.jpg: no such file"):
        list(batches)


def run_of(run, root, has_checkpoint):
    """A folder as a run over `root` leaves it."""
    run.mkdir()
    (run / "config.yaml").write_text(
        to_yaml(
            PretrainConfig.model_validate({"run": {"dir": run}, "model": {"bn_group_size": 2}, "data": {"root": root}})
        )
    )
    if has_checkpoint:
        (run / "checkpoints" / "step_00000001").mkdir(parents=True)
        (run / "checkpoints" / "step_00000001" / "checkpoint.json").write_text("{}")
    return run


@pytest.mark.parametrize(
    ("form", "harm", "has_checkpoint", "same_root", "status"),
    [("folder", renamed, True, True, EXIT_IO), ("packed", renamed, True, True, EXIT_IO),
     ("folder", unmounted, True, True, EXIT_IO), ("folder", without_train, True, True, EXIT_IO),
     ("folder", train_unmounted, True, True, EXIT_IO), ("folder", without_train, False, True, EXIT_MISTAKE),
     ("folder", renamed, False, True, EXIT_MISTAKE), ("folder", renamed, True, False, EXIT_MISTAKE)],
)  # fmt: skip
def test_at_the_start(images, tmp_path, capsys, form, harm, has_checkpoint, same_root, status):
    root = pack(images, images.with_suffix(".beton")) if form == "packed" else images
    run = run_of(tmp_path / "run", root if same_root else tmp_path / "another", has_checkpoint)
    harm(root)
    words = ["pretrain", "--data.root", str(root), "--run.dir", str(run), "--run.device", "cpu"]
    assert main([*words, "--tracking.backend", "none"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert ("is its disk mounted?" in line) == (status == EXIT_IO)


TRAINED, EVALUATED, NOBODY = "the run", "an evaluation", "nobody"


@pytest.mark.parametrize("command", ["knn", "linear", "finetune"])
@pytest.mark.parametrize(
    ("knows", "harm", "status"),
    [(TRAINED, renamed, EXIT_IO), (TRAINED, unmounted, EXIT_IO), (TRAINED, without_train, EXIT_IO),
     (TRAINED, without_val, EXIT_MISTAKE), (EVALUATED, without_val, EXIT_IO), (EVALUATED, renamed, EXIT_IO),
     (NOBODY, renamed, EXIT_MISTAKE), (NOBODY, train_unmounted, EXIT_MISTAKE)],
)  # fmt: skip
def test_at_an_evaluation(tmp_path, capsys, command, knows, harm, status):
    """It ends before a checkpoint is looked for, or, where all data is there, at this one, which is empty."""
    root = tmp_path / "images"
    for split in ("train", "val"):
        (root / split / "class").mkdir(parents=True)
        for name in ("0.jpg", "1.jpg"):  # a BN group of `run_of`, without which fine-tuning does not begin
            Image.new("RGB", (80, 70)).save(root / split / "class" / name)
    run = run_of(tmp_path / "run", root if knows == TRAINED else tmp_path / "another", has_checkpoint=True)
    words = [command, "--run-dir", str(run), "--data.root", str(root), "--device", "cpu", "--tracking", "none"]
    if command == "knn":
        words += ["--neighbours", "[1]"]
    if command == "finetune":
        words += ["--global-batch-size", "32"]
    if knows == EVALUATED:
        assert main(words) == EXIT_MISTAKE
        assert "mounted" not in capsys.readouterr().err
    harm(root)
    assert main(words) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert ("is its disk mounted?" in line) == (status == EXIT_IO), line


@pytest.mark.parametrize("part", ["ImageSets/Main/test.txt", "JPEGImages/000000.jpg", "Annotations", "."])
def test_at_a_detection(tmp_path, capsys, part):
    pytest.importorskip("pycocotools")
    voc = make_voc(tmp_path / "voc")
    torch.save(build_encoder(ModelConfig(arch="resnet10"), 0).backbone.state_dict(), tmp_path / "backbone.pth")
    words = ["detect", "--weights", str(tmp_path / "backbone.pth"), "--arch", "resnet10", "--data.root", str(voc),
             "--data.train-sets", "[trainval]", "--data.test-sets", "[test]", "--data.classes", "[cat, dog]",
             "--device", "cpu", "--tracking", "none"]  # fmt: skip
    too_large = ["--global-batch-size", "100"]  # found after the data
    if part != "Annotations":
        assert main([*words, *too_large]) == EXIT_MISTAKE
        assert "less than one batch" in capsys.readouterr().err
    (voc / part).rename(tmp_path / "elsewhere")
    assert main([*words, *too_large]) == (EXIT_MISTAKE if part == "Annotations" else EXIT_IO)
    (line,) = capsys.readouterr().err.splitlines()
    assert ("is its disk mounted?" in line) == (part != "Annotations"), line
