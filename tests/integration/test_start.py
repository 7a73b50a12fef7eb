"""`model.init` by the command itself: from a file, a run and timm; and what a run that goes on makes of it."""

import pytest
import safetensors.torch
import torch

from moco_dist.cli.main import main
from moco_dist.method.backbone import build_resnet
from tests.faults.processes import TINY, losses

pytestmark = pytest.mark.slow


@pytest.fixture
def pretrain(tiny_data, tmp_path):
    def start(name, init, *flags, stop="2"):
        words = ["--data.root", str(tiny_data), "--run.dir", str(tmp_path / name), *TINY, "--model.init", str(init)]
        return main(["pretrain", *words, "--run.stop-at-step", stop, *flags])

    return start


def test_a_run_goes_on_from_its_checkpoint_and_never_looks_at_the_file_again(pretrain, tmp_path, capsys):
    torch.manual_seed(3)
    theirs = tmp_path / "theirs.pth"
    torch.save(build_resnet("resnet10").state_dict(), theirs)
    assert pretrain("whole", theirs, stop="4") == 0
    assert f"begins with the weights of {theirs}: all " in capsys.readouterr().out
    assert pretrain("parts", theirs) == 0
    theirs.unlink()
    capsys.readouterr()
    assert pretrain("parts", theirs, stop="4") == 0
    assert "begins with the weights" not in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert pretrain("parts", "timm:resnet18", stop="6") == 2
    assert f"model.init: {theirs} in step_00000004, now timm:resnet18" in capsys.readouterr().err

    # A run is a start too; its head is not taken.
    assert pretrain("next", tmp_path / "whole", "--optim.base-lr", "1e-30") == 0
    said = capsys.readouterr().out
    assert f"begins with the weights of {tmp_path / 'whole'} after 4 steps: all " in said
    assert "left out: head;" in said
    before, after = (
        safetensors.torch.load_file(tmp_path / name / "backbone.safetensors") for name in ("whole", "next")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))


def test_weights_of_timm(pretrain, tmp_path, monkeypatch, capsys):
    """Out of the hub's cache, as timm leaves them there: a test downloads nothing."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert pretrain("none", "timm:resnet18.a1_in1k", "--model.arch", "resnet18") == 69
    assert "model.init timm:resnet18.a1_in1k cannot be had: " in capsys.readouterr().err
    repository = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    torch.manual_seed(4)
    theirs = {k: torch.rand_like(v.float()).to(v.dtype) for k, v in timm.create_model("resnet18").state_dict().items()}
    safetensors.torch.save_file(theirs, repository / "snapshots" / ("0" * 40) / "model.safetensors")
    assert pretrain("timm", "timm:resnet18.a1_in1k", "--model.arch", "resnet18", "--optim.base-lr", "1e-30") == 0
    trained = safetensors.torch.load_file(tmp_path / "timm" / "backbone.safetensors")
    assert all(torch.equal(trained[name], theirs[name]) for name in trained if name.endswith("weight"))
