"""A wheel is enough: built from the sdist alone, installed outside of the checkout, it does the main job there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.demo_seeds import prepared, settings_of

BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(*words, cwd, **environment):
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `moco-dist` of a fresh environment, whose other packages are those of the tests' environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "venv"
    for name in ("moco_dist", "configs"):
        shutil.copytree(name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(name, source)
    run(sys.executable, "-c", BUILD_SDIST, folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", target, cwd=folder)
    site = next((target / "lib").glob("python*")) / "site-packages"
    packages = next((Path(sys.prefix) / "lib").glob("python*")) / "site-packages"
    (site / "packages.pth").write_text(f"{packages}\n")
    run(target / "bin" / "python", *pip[1:], "install", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    own = {path.name for path in site.iterdir()} - {"packages.pth"}
    assert {name for name in own if not name.endswith(".dist-info")} == {"moco_dist"}  # no other top-level name
    assert (site / "moco_dist" / "py.typed").is_file()
    return target / "bin" / "moco-dist"


@pytest.mark.slow
def test_configs_by_name_are_enough_to_start(installed, tmp_path):
    names = [line for line in run(installed, "configs", cwd=tmp_path).splitlines() if line and line[0] != " "]
    assert names == sorted(path.stem for path in Path("configs").glob("*.yaml"))
    shown = run(installed, "configs", "show", "mocov2_r50_200ep", cwd=tmp_path)
    assert shown == Path("configs/mocov2_r50_200ep.yaml").read_text()
    script = run(installed, "launch", "slurm", "mocov2_r50_200ep", "--gpus-per-node", "8", "--dry-run", cwd=tmp_path)
    assert "pretrain mocov2_r50_200ep" in script  # every host looks the name up in its own installation
    where = ["--gpus-per-node", "8", "--image", "x", "--data.root", "/data/i", "--run.dir", "/runs/r", "--dry-run"]
    assert "kind: TrainJob" in run(installed, "launch", "kubernetes", "mocov2_r50_200ep", *where, cwd=tmp_path)
    rows = run(installed, "reproduce", "table1", "--dry-run", cwd=tmp_path).splitlines()
    assert len(rows) == 12
    assert all(line.startswith("moco-dist ") for line in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes, one after the other, on a busy machine
def test_the_demo_runs_in_any_folder(installed, tmp_path):
    """Fewer images, a smaller network and one epoch, by files of the demo's names in the folder."""
    prepared(tmp_path / "data" / "shapes", quick=True)
    for name, settings in settings_of(quick=True).items():
        tracking = {"demo": {"backend": "none"}, "demo_linear": "none"}[name]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**settings, "tracking": tracking}))
    out = run(installed, "demo", cwd=tmp_path, HOME=str(tmp_path), OMP_NUM_THREADS="1")
    assert "pre-trained − untrained" in out
    assert (tmp_path / "runs" / "demo" / "report" / "index.html").is_file(), out[-500:]
    found = run(installed, "doctor", "demo.yaml", "--run.device", "cpu", cwd=tmp_path, HOME=str(tmp_path))
    assert "240 images in data/shapes" in found
    assert os.listdir(tmp_path / "runs") == ["demo"]
