"""The commands of a user on GPUs: a run that stops and goes on, and its evaluations."""

import json
import subprocess

import pytest
import torch

from moco_dist.cli.main import main
from tests.faults.processes import command, losses

DEVICE, STEPS = "cuda", 8


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_goes_on_and_is_evaluated(tiny_data, tmp_path, precision, ranks):
    """With loader processes and pinned memory, asynchronous checkpoints, and NCCL where there are two GPUs."""
    if DEVICE == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed")
    more = ["--run.device", DEVICE, "--optim.precision", precision, "--data.num-workers", "2", "--log.every-steps", "1",
            "--run.peer-timeout-seconds", "120"]  # fmt: skip
    for run_dir, stops in ((tmp_path / "whole", [STEPS]), (tmp_path / "parts", [STEPS // 2, STEPS])):
        for stop in stops:
            words = command(tiny_data, run_dir, *more, "--run.stop-at-step", str(stop), ranks=ranks)
            done = subprocess.run(words, capture_output=True, text=True, timeout=250)
            assert done.returncode == 0, done.stdout + done.stderr
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == STEPS
    assert parts == pytest.approx(whole, rel=0.05)  # algorithms are chosen anew, and so is rounding
    common = ["--run-dir", str(tmp_path / "parts"), "--device", DEVICE, "--data.num-workers", "0", "--tracking", "none"]
    for kind, *flags in (("knn", "--neighbours", "[5]"), ("linear", "--epochs", "2"), ("finetune", "--epochs", "1")):
        assert main([kind, *common, *flags]) == 0
        assert json.loads((tmp_path / "parts" / "eval" / f"{kind}_trained.json").read_text())["num_val"] == 20
