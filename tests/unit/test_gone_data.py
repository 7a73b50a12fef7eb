"""data.root was there and is gone: renamed, or its disk is not mounted. Only a run that knew it starts again."""

import shutil

import pytest
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import to_yaml
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_IO, EXIT_MISTAKE, InfrastructureError


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
    (root / "val").mkdir()


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


@pytest.mark.parametrize(
    ("form", "harm", "has_checkpoint", "same_root", "status"),
    [("folder", renamed, True, True, EXIT_IO), ("packed", renamed, True, True, EXIT_IO),
     ("folder", unmounted, True, True, EXIT_IO), ("folder", without_train, True, True, EXIT_MISTAKE),
     ("folder", renamed, False, True, EXIT_MISTAKE), ("folder", renamed, True, False, EXIT_MISTAKE)],
)  # fmt: skip
def test_at_the_start(images, tmp_path, capsys, form, harm, has_checkpoint, same_root, status):
    root = pack(images, images.with_suffix(".beton")) if form == "packed" else images
    run = tmp_path / "run"
    before = {"run": {"dir": run}, "data": {"root": root if same_root else tmp_path / "another"}}
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(PretrainConfig.model_validate(before)))
    if has_checkpoint:
        (run / "checkpoints" / "step_00000001").mkdir(parents=True)
        (run / "checkpoints" / "step_00000001" / "checkpoint.json").write_text("{}")
    harm(root)
    words = ["pretrain", "--data.root", str(root), "--run.dir", str(run), "--run.device", "cpu"]
    assert main([*words, "--tracking.backend", "none"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert ("is its disk mounted?" in line) == (status == EXIT_IO)
