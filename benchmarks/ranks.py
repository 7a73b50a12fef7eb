"""Ranks for a benchmark: processes of this machine, all on loopback, or one on each namespace host."""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.hosts import Hosts
from moco_dist.distributed.collectives import process_group
from moco_dist.distributed.world import world_from_env


def run_ranks(
    function: Callable, world_size: int, made: Hosts | None = None, ranks_a_host: int = 1, **arguments: Any
) -> list[Any]:
    """`function(world, **arguments)` on each rank.

    Args:
        function: at the top of its module.
        world_size: how many ranks; each has its share of the cores.
        made: hosts to put them on; without, all are on loopback, which is one host.
        ranks_a_host: of them, on each.
        arguments: plain values.

    Returns:
        what the ranks returned, in rank order, through JSON.

    Raises:
        SystemExit: a rank failed; the others were ended.
    """
    module = function.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(ranks_a_host if made else world_size),
        "MASTER_ADDR": made.address(0) if made else "127.0.0.1",
        "MASTER_PORT": "29400" if made else str(_free_port()),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # gloo cannot look up names of hosts that have none
    }
    if made:
        # NCCL must not see through the namespaces and send over PCIe or shared memory.
        common |= {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "NCCL_P2P_DISABLE": "1",
                   "NCCL_SHM_DISABLE": "1"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.json" for rank in range(world_size)]
        ranks: list[subprocess.Popen] = []
        try:
            for rank, path in enumerate(results):
                words = [sys.executable, "-m", "benchmarks.ranks", module, function.__name__, json.dumps(arguments),
                         str(path)]  # fmt: skip
                env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % ranks_a_host if made else rank)}
                words = made.command(rank // ranks_a_host, words) if made else words
                ranks.append(subprocess.Popen(words, env=env))
            while any(rank.poll() is None for rank in ranks):
                if any(rank.poll() for rank in ranks):
                    raise SystemExit("a rank failed")
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return [json.loads(path.read_text()) for path in results]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(module: str, name: str, arguments: str, path: str) -> None:
    """One rank's process."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    values = json.loads(arguments)
    world = world_from_env(values.pop("device", "cpu"))
    with process_group(world):
        result = getattr(importlib.import_module(module), name)(world, **values)
    Path(path).write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
