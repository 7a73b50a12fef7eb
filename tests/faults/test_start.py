"""Ranks that are told to end before they train do, and nobody is left to end them otherwise."""

import os
import signal
import socket
import subprocess
import time

import psutil
import pytest

from tests.faults.processes import command, rank_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
LEFT_SECONDS = 120  # far less than the ten minutes that ranks wait for each other


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def has_torch(process):
    try:
        return any("libtorch_cpu" in place.path for place in process.memory_maps())
    except (psutil.Error, FileNotFoundError):
        return False


MOMENTS = {
    "torch is imported": lambda ranks, run_dir: all(map(has_torch, ranks)),
    "the ranks have met": lambda ranks, run_dir: (run_dir / ".lock").exists(),
    "the state is built": lambda ranks, run_dir: (run_dir / "config.yaml").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ranks_end_whose_torchrun_is_gone(start, tmp_path, moment):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_until(process, lambda: len(rank_processes(process)) == 2)
    ranks = rank_processes(process)
    wait_until(process, lambda: MOMENTS[moment](ranks, run_dir))
    process.kill()
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(ranks, timeout=LEFT_SECONDS)
    for rank in alive:
        rank.kill()
    assert alive == []


def test_a_rank_ends_that_waits_for_one_that_never_comes(tiny_data, tmp_path):
    """Rank 0 holds the store, and waits for the others inside torch, where no handler of Python's runs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    words = command(tiny_data, tmp_path / "run", ranks=1)
    process = subprocess.Popen(words, env={**os.environ, **place}, stdout=subprocess.DEVNULL)
    try:
        while not any(c.laddr.port == port for c in psutil.Process(process.pid).net_connections()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LEFT_SECONDS) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
