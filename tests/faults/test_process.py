"""The real command under torchrun: told to stop, frozen, killed, diverging, started twice."""

import json
import re
import shutil
import signal

import psutil
import pytest

from moco_dist.distributed.stop import SAME_SIGNAL_SECONDS
from tests.faults.processes import losses, rank_processes, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


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
    assert f"stopped: saved at step {step}; run the same command to go on" in output
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{step:08d}"]

    stop = str(step + 4)
    resumed = start(run_dir, "--log.every-steps", "1", "--run.stop-at-step", stop)
    assert f"goes on at step {step}" in resumed.communicate()[0]
    assert resumed.returncode == 0
    assert not (run_dir / "preempted.json").exists()
    whole = start(whole_dir, "--log.every-steps", "1", "--run.stop-at-step", stop)
    whole.communicate()
    assert losses(run_dir) == losses(whole_dir)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_process_alone_saves_too(start, tmp_path, signum):
    process = start(tmp_path / "run", ranks=1)
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signum)
    output = process.communicate()[0]
    assert process.returncode == 75, output
    assert (tmp_path / "run" / "preempted.json").is_file()


def test_a_second_signal_ends_a_rank_at_once(start, tmp_path):
    """In a collective that does not return, as here the other rank is frozen: no checkpoint can be made."""
    run_dir = tmp_path / "run"
    process = start(run_dir, "--run.peer-timeout-seconds", "120", torchrun=("--shutdown-timeout", "1"))
    wait_for_step(process, run_dir, 2)
    first, second = rank_processes(process)
    second.suspend()
    first.send_signal(signal.SIGTERM)
    with pytest.raises(psutil.TimeoutExpired):
        first.wait(SAME_SIGNAL_SECONDS + 1)
    first.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert "exitcode: 143" in output or "exitcode  : 143" in output, output
    assert not (run_dir / "preempted.json").exists()
    assert not list(run_dir.glob("checkpoints/step_*"))


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
    assert second.returncode == 73
    assert f"run.dir {run_dir} is in use by process {first.pid} on host" in output


def test_a_run_folder_that_is_removed_is_made_again_with_what_was_learned(start, tmp_path):
    process = start(tmp_path / "run", "--log.every-steps", "1", ranks=1)
    wait_for_step(process, tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "run")
    output = process.communicate()[0]
    assert process.returncode == 75, output
    assert f"run.dir {tmp_path / 'run'} was removed; it is made again, and the run saves there and stops" in output
    step = int(re.search(r"stopped: saved at step (\d+)", output)[1])
    again = start(tmp_path / "run", "--run.stop-at-step", str(step + 2), ranks=1)
    assert f"goes on at step {step}" in again.communicate()[0]
    assert again.returncode == 0
