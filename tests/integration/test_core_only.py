"""The core needs none of the optional packages: it trains where their imports fail, and the demo installs none."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moco_dist.datasets.prepare import prepare_shapes

OPTIONAL = ("deepspeed", "ffcv", "mlflow", "nvidia.dali", "triton", "timm", "cv2", "numba", "pycocotools",
            "pyarrow", "obstore", "onnx", "umap")  # fmt: skip
PROGRAM = f"""
import contextlib, io, json, sys
from importlib.machinery import PathFinder

class WithoutOptional(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.startswith({OPTIONAL}) else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOptional
from moco_dist.cli.main import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(words)
    print("ENDED", json.dumps([status, said.getvalue()]))
"""


def without_optional(*commands):
    """The exit status and the stderr of each command, all in one process: to import torch takes longer than any."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", PROGRAM, words], capture_output=True, text=True)
    ended = [json.loads(line.removeprefix("ENDED")) for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert len(ended) == len(commands), done.stderr
    return ended


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_demo_installs_the_core_and_the_tests_add_the_rest(tmp_path):
    """On a fresh clone, and where the demo has been run before."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(Path(name), tmp_path)

    def installs(target):
        done = subprocess.run(["make", "--dry-run", target], cwd=tmp_path, capture_output=True, text=True, check=True)
        return re.findall(r'pip install --quiet --editable "?(\S+?)"?[;\n]', done.stdout)

    assert installs("demo") == ["."]
    assert installs("check") == [".", ".[dev]", ".[ffcv]"]
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".core-installed").touch()
    assert installs("demo") == []
    assert installs("check") == [".[dev]", ".[ffcv]"]


@pytest.mark.slow
def test_it_trains_without_any_optional_package(tmp_path):
    data = prepare_shapes(tmp_path / "shapes", num_train=20, num_val=10)
    tiny = [
        "pretrain", "--data.root", str(data), "--run.dir", str(tmp_path / "run"), "--data.image-size", "32",
        "--data.num-workers", "0", "--model.arch", "resnet10", "--model.head-hidden-dims", "[16]",
        "--model.bn-group-size", "4", "--moco.queue-size", "16", "--optim.global-batch-size", "8",
        "--optim.epochs", "1",
    ]  # fmt: skip
    untracked = [*tiny, "--tracking.backend", "none"]
    run, out = tmp_path / "run", tmp_path / "f.parquet"
    missing = {
        "deepspeed": ["--engine.kind", "deepspeed"], "dali": ["--data.loader", "dali"],
        "timm": ["--model.init", "timm:resnet10t"], "obstore": ["--data.root", "s3://bucket/set"],
    }  # fmt: skip
    (tmp_path / "x.parquet").touch()
    trained, evaluated, detected, features, exported, packed, tracked, *refused = without_optional(
        untracked,
        ["knn", "--run-dir", run, "--neighbours", "[5]", "--data.num-workers", "0", "--tracking", "none"],
        ["detect", "--run-dir", run, "--data.root", data],
        ["features", run, data, "--out", out],
        ["export", run, "--format", "onnx", "--out", tmp_path / "w.onnx"],
        ["data", "pack", tmp_path / "x.parquet", tmp_path / "x.beton"],
        [*tiny, "--run.dir", tmp_path / "tracked"],
        *([*untracked, "--run.dir", tmp_path / name, *flags] for name, flags in missing.items()),
    )
    assert trained[0] == evaluated[0] == 0, (trained, evaluated)
    assert (run / "backbone.safetensors").is_file()
    for (status, line), package in zip(refused, missing, strict=True):
        assert status == 2, line
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        assert package in line
        assert "pip install" in line
    for (status, line), what in (
        (detected, "pip install 'moco_dist[detection]'"),
        (features, "pip install 'moco_dist[parquet]', or write a .npz"),
        (exported, "pip install 'moco_dist[export]'"),
        (packed, "parquet is read by pyarrow: pip install 'moco_dist[parquet]'"),
        (tracked, "mlflow"),
    ):
        assert (status, line.count("\n")) == (2, 1), line
        assert what in line
