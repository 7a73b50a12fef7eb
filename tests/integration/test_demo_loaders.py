"""The demo's pre-training and kNN with each loader: the same images, so the same losses."""

import json
import subprocess
import sys

import pytest

from moco_dist.datasets.pack import pack
from moco_dist.datasets.prepare import prepare_shapes

STEPS = 3


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small set of shapes, in a folder and packed."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    prepare_shapes(root, num_train=200, num_val=40)
    pack(root, root.with_suffix(".beton"))
    return root


def moco_dist(*words):
    done = subprocess.run(
        [sys.executable, "-m", "moco_dist", *map(str, words)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def losses_of(shapes, tmp_path_factory):
    """Losses of the first steps by a loader, and the kNN accuracy after them."""
    runs = tmp_path_factory.mktemp("runs")
    found = {}

    def losses(loader):
        if loader not in found:
            configs = ["configs/demo.yaml", *([f"configs/demo_{loader}.yaml"] if loader != "torchvision" else [])]
            root = shapes.with_suffix(".beton") if loader == "ffcv" else shapes
            settings = {
                "run.dir": runs / loader, "data.root": root, "run.stop-at-step": STEPS, "log.every-steps": 1,
                "optim.precision": "fp32", "tracking.backend": "none",
                "moco.queue-size": 128,  # which an epoch of so few images fills
                "optim.base-lr": 1e-3,  # steps at the demo's rate would enlarge what DALI rounds otherwise
            }  # fmt: skip
            flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
            moco_dist("pretrain", *configs, *flags)
            knn = moco_dist("knn", "--run-dir", runs / loader, "--data.num-workers", 0, "--tracking", "none")
            lines = [json.loads(line) for line in (runs / loader / "log.jsonl").read_text().splitlines()]
            found[loader] = [line["loss"] for line in lines if "loss" in line], knn
        return found[loader]

    return losses


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "ffcv"])
def test_the_demo_runs_with_each_loader(loader, losses_of):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="needs pip install 'moco_dist[dali]'")
    (ours, our_knn), (reference, reference_knn) = losses_of(loader), losses_of("torchvision")
    assert len(ours) == STEPS
    assert ours == (pytest.approx(reference, rel=1e-2) if loader == "dali" else reference)
    assert "knn_top1" in our_knn or "%" in our_knn
    if loader == "ffcv":
        assert our_knn == reference_knn
