"""The main job on real images, shortened: `configs/fashion_mnist_r18.yaml` on two ranks, as a user starts it."""

import json
import os
import subprocess
import sys

import pytest

from moco_dist.data.sources import find_images
from moco_dist.datasets.prepare import prepare_fashion_mnist
from moco_dist.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TRAIN, VAL = 512, 256


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Fashion-MNIST from wherever this machine has it; the first images of each class are enough here."""
    whole = tmp_path_factory.mktemp("data") / "fashion-mnist"
    try:
        return prepare_fashion_mnist(whole)
    except UserError as error:
        pytest.skip(str(error))


def on_two_ranks(*words):
    """The output of `torchrun -m moco_dist WORDS`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "moco_dist", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_main_job_on_real_images(data, tmp_path):
    assert [len(find_images(data, split).paths) for split in ("train", "val")] == [60_000, 10_000]
    run_dir = tmp_path / "run"
    pretrain = [
        "pretrain", "configs/fashion_mnist_r18.yaml", "--data.root", data, "--run.dir", run_dir,
        "--data.num-workers", 1, "--data.max-samples", TRAIN, "--optim.global-batch-size", 64,
        "--moco.queue-size", 256, "--log.every-steps", 1, "--log.knn-every-epochs", 0,
    ]  # fmt: skip
    assert "starts" in on_two_ranks(*pretrain, "--run.stop-at-step", 2)
    assert "goes on at step 2" in on_two_ranks(*pretrain, "--run.stop-at-step", 4)
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 < row["loss"] < 20
        assert 0 < row["embedding_std"] <= 1.1
        assert 0 <= row["data_wait_share"] <= 1
        assert row["images_per_second"] > 0
        # Of this process's own steps alone, right after going on too: the time that its next steps take as it goes.
        expected = (4 - row["step"] if row["step"] > 2 else 2 - row["step"]) * 64 / row["images_per_second"]
        assert row["eta_seconds"] == pytest.approx(expected)

    sizes = ["--data.num-workers", 1, "--data.max-train-samples", TRAIN, "--data.max-val-samples", VAL]
    knn = on_two_ranks("knn", "--run-dir", run_dir, "--encoders", "[pixels, trained]", *sizes)
    assert "trained: knn_top1_k10" in knn
    linear = ["--features", "cached", "--epochs", 3, "--milestones", "[2]", *sizes]
    on_two_ranks("linear", "--run-dir", run_dir, "--encoders", "[pixels]", *linear)
    for name in ("knn_pixels", "knn_trained", "linear_pixels"):
        result = json.loads((run_dir / "eval" / f"{name}.json").read_text())
        assert (result["num_train"], result["num_val"]) == (TRAIN, VAL)
    # Not of ten labels at random: pixels tell clothes apart without any training.
    pixels = json.loads((run_dir / "eval" / "knn_pixels.json").read_text())["accuracy"]["knn_top1_k20"]
    assert pixels > 50
