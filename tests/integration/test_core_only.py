"""The core needs none of the optional packages: it trains where their imports fail, and the demo installs none."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moco_dist.datasets.prepare import prepare_shapes

OPTIONAL = ("deepspeed", "ffcv", "mlflow", "nvidia.dali", "triton", "timm", "cv2", "numba", "pycocotools",
            "pyarrow", "obstore")  # fmt: skip
PROGRAM = f"""
import sys
from importlib.machinery import PathFinder

class WithoutOptional(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.startswith({OPTIONAL}) else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOptional
from moco_dist.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def without_optional(*words):
    return subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True)


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
    done = without_optional(*tiny, "--tracking.backend", "none")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "backbone.safetensors").is_file()
    flags = ["--neighbours", "[5]", "--data.num-workers", "0", "--tracking", "none"]
    evaluated = without_optional("knn", "--run-dir", str(tmp_path / "run"), *flags)
    assert evaluated.returncode == 0, evaluated.stderr
    for flags, package in (
        (["--engine.kind", "deepspeed"], "deepspeed"), (["--data.loader", "dali"], "dali"),
        (["--model.init", "timm:resnet10t"], "timm"), (["--data.root", "s3://bucket/set"], "obstore"),
    ):  # fmt: skip
        done = without_optional(*tiny, "--tracking.backend", "none", "--run.dir", str(tmp_path / package), *flags)
        assert done.returncode == 2, done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert package in line
        assert "pip install" in line
    done = without_optional("detect", "--run-dir", str(tmp_path / "run"), "--data.root", str(data))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install 'moco_dist[detection]'" in done.stderr
    done = without_optional("features", str(tmp_path / "run"), str(data), "--out", str(tmp_path / "f.parquet"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install 'moco_dist[parquet]', or write a .npz" in done.stderr
    done = without_optional(*tiny, "--run.dir", str(tmp_path / "tracked"))
    assert done.returncode == 2
    assert "mlflow" in done.stderr
    assert done.stderr.count("\n") == 1
