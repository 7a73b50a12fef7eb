"""Ranks for a benchmark: processes of this machine, all on loopback, or some on each namespace host.

They are forked from a server that has imported what they need, and else done nothing: an import takes ten seconds of a
core, and more than some measurements.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks.hosts import INTERFACE, Hosts
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
        what the ranks returned, in rank order.

    Raises:
        SystemExit: a rank failed; the others were ended.
    """
    module = function.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # gloo cannot look up names of hosts that have none
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["benchmarks.ranks", module])  # of the first call
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(ranks_a_host if made else world_size),
        "MASTER_ADDR": made.address(0) if made else "127.0.0.1",
        "MASTER_PORT": "29400" if made else str(_free_port()),
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // world_size)),
    }
    if made:
        # NCCL must not see through the namespaces and send over PCIe or shared memory.
        common |= {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE, "NCCL_P2P_DISABLE": "1",
                   "NCCL_SHM_DISABLE": "1"}  # fmt: skip
    processes, pipes, results = [], {}, {}
    try:
        for rank in range(world_size):
            here, there = forked.Pipe()
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % ranks_a_host if made else rank)}
            job = (made, rank // ranks_a_host, env, module, function.__name__, arguments, there)
            processes.append(forked.Process(target=_rank, args=job))
            with mock.patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):  # which is not to run again there
                processes[-1].start()
            there.close()
            pipes[here] = rank
        while len(results) < world_size:
            for pipe in wait([pipe for pipe, rank in pipes.items() if rank not in results]):
                results[pipes[pipe]] = pipe.recv()  # type: ignore[union-attr, index]
        for process in processes:
            process.join()
    except EOFError:
        raise SystemExit("a rank failed") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(
    made: Hosts | None, host: int, env: dict[str, str], module: str, name: str, arguments: dict[str, Any],
    pipe: Connection,
) -> None:  # fmt: skip
    """One rank's process."""
    if made:
        made.enter(host)
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    values = dict(arguments)
    world = world_from_env(values.pop("device", "cpu"))
    with process_group(world):
        result = getattr(importlib.import_module(module), name)(world, **values)
    pipe.send(result)
