"""Commands that take long beside the pre-training, as a person starts them: told to stop they keep it, and go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.config.pretrain import ModelConfig
from moco_dist.datasets.pack import CHUNK, pack
from moco_dist.method.encoder import build_encoder
from tests.voc import CLASSES, make_voc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture
def command():
    """Start `moco-dist WORDS`; what goes on is ended with the test."""
    started = []

    def start(*words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        words = [sys.executable, "-m", "moco_dist", *map(str, words)]
        started.append(subprocess.Popen(words, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until(is_so, process):
    while not is_so():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def stopped(process, signum):
    """What it says once it is told to stop."""
    process.send_signal(signum)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    assert "Traceback" not in said
    return re.search(r"stopped: (.*); run the same command to go on\n$", said)[1]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_packing(command, tmp_path, signum):
    folder = tmp_path / "set" / "train" / "a"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4 * CHUNK, 64, 64, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png", compress_level=0)
    words = "data", "pack", tmp_path / "set", tmp_path / "x.beton"
    first = command(*words)
    wait_until((tmp_path / ".x.beton.partial").exists, first)
    done = re.fullmatch(r"([\d,]+) of 1,024 images are packed", stopped(first, signum))[1]
    assert 0 <= int(done.replace(",", "")) < 4 * CHUNK and not (tmp_path / "x.beton").exists()
    again = command(*words)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert done == "0" or f"goes on after {done} of 1,024 images" in said
    assert (tmp_path / "x.beton").read_bytes() == pack(tmp_path / "set", tmp_path / "whole.beton").read_bytes()


def cpu_seconds(process):
    """Its own: how far it is hardly depends on what else runs."""
    return sum(psutil.Process(process.pid).cpu_times()[:2])


def steps_of_two_calls(command, words):
    """Where the first call and the second one were stopped, each after some work since it had begun to load images."""
    steps = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = command(*words, "--data.num-workers", "1")
        wait_until(psutil.Process(process.pid).children, process)
        begun = cpu_seconds(process)
        wait_until(lambda begun=begun, process=process: cpu_seconds(process) > begun + 6, process)
        steps.append(int(re.fullmatch(r"saved at step (\d+)", stopped(process, signum))[1]))
    return steps


def test_fine_tuning(command, tmp_path, tiny_data):
    weights, run_dir = tmp_path / "w.pth", tmp_path / "run"
    torch.save(build_encoder(ModelConfig(arch="resnet10"), 0).backbone.state_dict(), weights)
    assert (
        main(["import", str(weights), "--arch", "resnet10", "--data-root", str(tiny_data), "--out", str(run_dir)]) == 0
    )
    words = ["finetune", "--run-dir", run_dir, "--epochs", "1000", "--global-batch-size", "32", "--tracking", "none",
             "--data.image-size", "32"]  # fmt: skip
    first, second = steps_of_two_calls(command, words)
    assert second > first
    assert len(list((run_dir / "eval").glob(".finetune_trained_*.safetensors"))) == 1


def test_detection(command, tmp_path):
    make_voc(tmp_path / "voc")
    torch.save(build_encoder(ModelConfig(arch="resnet10"), 0).backbone.state_dict(), tmp_path / "w.pth")
    words = ["detect", "--weights", tmp_path / "w.pth", "--arch", "resnet10", "--steps", "10000", "--tracking", "none",
             "--global-batch-size", "2", "--short-sides", "[32]", "--milestones", "[]", "--data.root", tmp_path / "voc",
             "--data.train-sets", "[trainval]", "--data.test-sets", "[test]", "--data.classes", json.dumps([*CLASSES]),
             "--device", "cpu"]  # fmt: skip
    first, second = steps_of_two_calls(command, words)
    assert second > first
    assert len(list(tmp_path.glob(".w.pth.detection.json_*.safetensors"))) == 1
