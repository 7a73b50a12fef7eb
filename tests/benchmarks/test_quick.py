"""Each benchmark runs: a change of what it calls breaks its `--quick` here, and not on the day it is needed."""

import os
import subprocess
import sys

import pytest

from benchmarks.gpu import parts
from benchmarks.hosts import why_not
from benchmarks.results import FOLDER

NEEDS_ROOT = {"network", "plan_validation"}
IN_MAKE_GPU = {part.words[0].removeprefix("benchmarks.") for part in parts()}  # test_gpu.py runs them
SCRIPTS = sorted(
    path.stem
    for path in FOLDER.parent.glob("*.py")
    if "results.parse(" in path.read_text() and path.stem not in IN_MAKE_GPU
)


def contents():
    """Of the folder of results."""
    return {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs_and_a_quick_run_writes_no_result(script):
    if script in NEEDS_ROOT and (reason := why_not()):
        pytest.skip(reason)
    before = contents()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", f"benchmarks.{script}", "--quick"]
    done = subprocess.run(words, cwd=FOLDER.parents[1], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    assert contents() == before
