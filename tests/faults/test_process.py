"""The real command under torchrun: told to stop, frozen, killed, diverging, started twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moco_dist.data.prepare import prepare_shapes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
TINY = [
    "--data.image-size", "32", "--data.num-workers", "0", "--model.arch", "resnet10",
    "--model.head-hidden-dims", "[16]", "--model.bn-group-size", "4", "--moco.queue-size", "64",
    "--optim.global-batch-size", "8", "--optim.epochs", "100", "--log.every-steps", "2",
    "--tracking.backend", "none", "--run.peer-timeout-seconds", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=80, num_val=20)


def command(data: Path, run_dir: Path, *flags: str, ranks: int = 2, torchrun: tuple[str, ...] = ()) -> list[str]:
    """`moco-dist pretrain` as a user starts it."""
    words = [sys.executable, "-m"]
    if ranks > 1:
        words += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *torchrun, "-m"]
    return [*words, "moco_dist", "pretrain", "--data.root", str(data), "--run.dir", str(run_dir), *TINY, *flags]


@pytest.fixture
def start(data):
    """A function as `command`, without `data`, that starts it with its output in a pipe."""
    started = []

    def start_one(*args, **more) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = command(data, *args, **more)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(words, env=environment, **pipes))
        return started[-1]

    yield start_one
    for process in started:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
        if not process.stdout.closed:
            process.communicate()


def steps_logged(run_dir: Path) -> int:
    log = run_dir / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    while steps_logged(run_dir) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def rank_processes(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks under a torchrun, in order."""
    ranks = [p for p in psutil.Process(process.pid).children() if "moco_dist" in " ".join(p.cmdline())]
    return sorted(ranks, key=lambda p: int(p.environ()["RANK"]))


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_one_rank_is_told_to_stop_and_all_save_and_go_on_later(start, tmp_path, signum):
    run_dir, whole_dir = tmp_path / "run", tmp_path / "whole"
    process = start(run_dir, "--log.every-steps", "1")
    wait_for_step(process, run_dir, 3)
    rank_processes(process)[1].send_signal(signum)
    output = process.communicate()[0]
    assert process.returncode
    assert "exitcode: 75" in output or "exitcode  : 75" in output
    step = json.loads((run_dir / "preempted.json").read_text())["step"]
    assert f"preempted: saved at step {step}; run the same command to go on" in output
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{step:08d}"]

    stop = str(step + 4)
    resumed = start(run_dir, "--log.every-steps", "1", "--run.stop-at-step", stop)
    assert f"goes on at step {step}" in resumed.communicate()[0]
    assert resumed.returncode == 0
    assert not (run_dir / "preempted.json").exists()
    whole = start(whole_dir, "--log.every-steps", "1", "--run.stop-at-step", stop)
    whole.communicate()
    assert losses(run_dir) == losses(whole_dir)


def test_one_process_alone_saves_too(start, tmp_path):
    process = start(tmp_path / "run", ranks=1)
    wait_for_step(process, tmp_path / "run", 2)
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == 75, output
    assert (tmp_path / "run" / "preempted.json").is_file()


def test_a_silent_rank_is_named(start, tmp_path):
    """As a host without power: it closes no connection."""
    process = start(tmp_path / "run", torchrun=("--shutdown-timeout", "3"))
    wait_for_step(process, tmp_path / "run", 2)
    rank_processes(process)[1].suspend()
    output = process.communicate()[0]
    assert process.returncode
    assert re.search(r"rank 1 on host \S+ has not been heard of for 4 s", output)
    assert "exitcode: 69" in output or "exitcode  : 69" in output


def test_a_killed_rank_is_named_and_torchrun_goes_on(start, tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--checkpoint.every-steps", "4", "--run.stop-at-step", "60"]
    process = start(run_dir, *flags, torchrun=("--max-restarts", "1"))
    wait_for_step(process, run_dir, 6)
    rank_processes(process)[1].kill()
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert re.search(r"goes on at step \d+[02468]\b|goes on at step [48]\b", output)
    assert losses(run_dir)[60]


def test_a_loss_that_is_no_number_stops_all_ranks(start, tmp_path):
    process = start(tmp_path / "run", "--optim.base-lr", "1e30", "--optim.lr-scaling", "none")
    output = process.communicate()[0]
    assert process.returncode
    for rank in (0, 1):
        line = rf"\[rank {rank}\] error: the loss is (nan|inf) at step \d+ \(learning rate 1e\+30\)"
        assert re.search(line, output), output
    assert "moco_dist/train.py" not in output  # the only traceback is that of torchrun
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_living_run_is_not_disturbed(start, tmp_path):
    run_dir = tmp_path / "run"
    first = start(run_dir, ranks=1)
    wait_for_step(first, run_dir, 2)
    second = start(run_dir, ranks=1)
    output = second.communicate()[0]
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"run.dir {run_dir} is in use by process {first.pid} on host" in output
