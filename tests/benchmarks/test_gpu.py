"""`make gpu`: one failing part stops no other, and what was measured is not measured again."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu, results
from benchmarks.gpu import Part, Record, call

GOOD = (
    "from pathlib import Path; Path('results/a_cpu_2026-01-01.json').write_text('{\"rows\": [1]}'); print('wrote it')"
)
BAD = "import sys; print('half'); sys.exit('out of memory')"
SLOW = """
import signal, sys, time
def stop(*_):
    print('kept', flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print(sys.argv[1:], flush=True)
open('calls', 'a').write('x')
if len(open('calls').read()) < 2:
    time.sleep(60)
print('whole')
"""
WITHOUT_OPTIONAL = """
import sys
from importlib.machinery import PathFinder

class WithoutOptional(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        optional = ("mlflow", "nvidia.dali", "deepspeed", "ffcv", "cv2", "timm", "pycocotools", "matplotlib", "jinja2",
                    "pyarrow", "obstore", "kornia", "pandas", "sklearn")
        return None if name.startswith(optional) else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOptional
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout whose parts are these three."""
    for name, text in {"good": GOOD, "bad": BAD, "slow": SLOW}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 5)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    return tmp_path


def call_of(root, parts, seconds=60.0, again=()):
    """Status and note of each part after a call, and the parts that it ran."""
    record = Record(root / "gpu.json")
    ran = []
    keep = record.keep
    record.keep = lambda name, **facts: (ran.append(name), keep(name, **facts))
    for name in again:
        record.forget(name)
    call(parts, record, seconds + gpu.GRACE_SECONDS, False, list(again))
    assert all(part.name in gpu.table(parts, record) for part in parts)
    return {part.name: (record.part(part.name)["status"], record.part(part.name)["note"]) for part in parts}, ran


def test_a_part_that_fails_is_told_and_tried_again_after_the_others(root):
    parts = [Part("bad", ["bad"], 60), Part("lacks", ["good"], 60, why_not=lambda: "not installed: it"),
             Part("good", ["good"], 60)]  # fmt: skip
    found, ran = call_of(root, parts)
    assert found == {"bad": ("failed", "status 1: out of memory"), "lacks": ("left out", "not installed: it"),
                     "good": ("done", "wrote it")}  # fmt: skip
    assert ran == ["bad", "lacks", "good"]
    assert call_of(root, parts)[1] == ["lacks", "bad"]
    assert call_of(root, parts, again=["good"])[1] == ["lacks", "good", "bad"]


def test_a_part_that_is_cut_goes_on_in_the_next_call(root):
    parts = [Part("slow", ["slow"], 600, goes_on=True)]
    found, _ = call_of(root, parts, seconds=3)
    assert found == {"slow": ("cut", "the call was over")}
    assert json.loads((root / "gpu.json").read_text())["parts"]["slow"]["end"][-1] == "kept"
    assert call_of(root, parts)[0] == {"slow": ("done", "whole")}


def test_a_part_that_takes_too_long_has_failed_and_one_that_has_no_time_is_left_for_the_next_call(root):
    parts = [Part("slow", ["slow"], 2), Part("good", ["good"], 600)]
    found, _ = call_of(root, parts, seconds=30)
    assert found == {"slow": ("failed", "longer than 2 s"), "good": ("not run", "")}


def test_the_record_brings_the_results_to_another_checkout(root):
    call_of(root, [Part("good", ["good"], 60)])
    (file,) = (root / "results").iterdir()
    file.unlink()
    Record(root / "gpu.json")
    assert json.loads(file.read_text()) == {"rows": [1]}


def test_a_failure_stays_told_while_there_is_no_time_to_try_again(root):
    parts = [Part("bad", ["bad"], 60)]
    assert (
        call_of(root, parts)[0] == call_of(root, parts, seconds=1)[0] == {"bad": ("failed", "status 1: out of memory")}
    )


def test_rows_are_kept_where_hardware_versions_and_facts_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.write("step_parts", [{"way": "eager"}], arch="resnet50")
    assert results.earlier_rows("step_parts", "cpu", arch="resnet50") == [{"way": "eager"}]
    assert results.earlier_rows("step_parts", "cpu", arch="resnet18") == []
    assert results.earlier_rows("update", "cpu") == []
    with monkeypatch.context() as patch:
        patch.setattr(results, "hardware", lambda device: "2 CPU cores of another make")
        assert results.earlier_rows("step_parts", "cpu", arch="resnet50") == []
    monkeypatch.setattr(sys, "argv", ["step_parts", "--quick"])
    results.write("update", [])
    assert results.earlier_rows("step_parts", "cpu", arch="resnet50") == []
    assert len(list(tmp_path.iterdir())) == 1


def test_a_python_that_lacks_a_package_is_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setitem(gpu.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit, match=r"lacks no-such-package; docs/benchmarks.md"):
        gpu.main()


def test_the_tests_for_a_gpu_are_found():
    assert "tests/integration/test_on_a_gpu.py" in gpu.gpu_tests()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_part_runs(tmp_path):
    """In its smallest form, on whatever is here, and as on a machine that has torch and little else."""
    record = tmp_path / "gpu.json"
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_OPTIONAL)  # each process imports it as it starts
    words = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--record", str(record)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=gpu.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.rindex("\npart ") + 1 :]
    statuses = dict(line.split()[:2] for line in table.splitlines()[1:] if line)
    assert list(statuses) == [part.name for part in gpu.parts()]
    assert set(statuses.values()) <= {"done", "left"}, done.stdout
    assert "nvidia-dali" in done.stdout  # the loaders' part says that it is not there
    assert not record.exists()
