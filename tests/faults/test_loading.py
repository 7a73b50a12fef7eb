"""The real command where loader workers have little room, hang or are killed."""

import json
import os
import re
import shutil
import signal
import subprocess

import psutil
import pytest

from tests.faults.processes import command, losses, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
WORKERS = ["--data.num-workers", "2", "--log.every-steps", "1"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting needs root and unshare")
def test_no_room_in_shared_memory_and_a_long_tmpdir_do_not_matter(tiny_data, tmp_path):
    """As in a container of 64 MB: here less than one batch."""
    long = tmp_path / ("x" * 118)
    long.mkdir()
    words = command(tiny_data, tmp_path / "run", *WORKERS, "--run.stop-at-step", "4", ranks=1)
    script = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$@"'
    environment = {**os.environ, "TMPDIR": str(long), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "-m", "bash", "-c", script, "-", *words], env=environment, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_request_to_stop_is_heard_while_a_batch_is_waited_for(start, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, *WORKERS, ranks=1)
    wait_for_step(process, run_dir, 3)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 75, output
    step = json.loads((run_dir / "preempted.json").read_text())["step"]
    assert f"stopped: saved at step {step}; run the same command to go on" in output
    assert max(losses(run_dir)) == step


def test_a_killed_worker_costs_nothing(start, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, *WORKERS, "--run.stop-at-step", "40", ranks=1)
    wait_for_step(process, run_dir, 3)
    psutil.Process(process.pid).children()[0].kill()
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert re.search(r"\[rank 0\] warning: loader worker \d+ was killed \(SIGKILL", output)
    assert sorted(losses(run_dir)) == list(range(1, 41))


def test_few_files_are_told_at_the_start(tiny_data, tmp_path):
    words = command(tiny_data, tmp_path / "run", "--run.stop-at-step", "1", ranks=1)
    done = subprocess.run(["bash", "-c", 'ulimit -n 200 && exec "$@"', "-", *words], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "[rank 0] warning: open files: a process may open 200, and about 256 are needed: a hard limit (" in done.stderr
    )
