"""Run a function on n ranks: processes of this machine that talk over gloo.

They are forked from a server that has imported torch already, so two ranks take a tenth of a second, and nothing
that a rank does to its modules reaches another test.
"""

import dataclasses
import multiprocessing
import pickle
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from moco_dist.distributed.world import World

COLLECTIVE_SECONDS = 60  # a rank that waits longer for the others fails
TOTAL_SECONDS = 240

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(
    ["pytest", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "torchvision.models",
     "torchvision.datasets.folder", "safetensors.torch", "moco_dist.config.pretrain",
     "moco_dist.distributed.collectives"]
)  # fmt: skip


def run(function, world_size, *args):
    """`function(world, *args)` on each of `world_size` ranks.

    Warnings are errors there too. The first exception of a rank is raised here, with that rank's traceback as a note;
    no process is left in any case.

    Args:
        function: defined in a module, so that the ranks can import it.
        world_size: how many ranks.
        args: plain values and tensors; every rank has its own copy.

    Returns:
        what the ranks returned, in rank order.
    """
    job = pickle.dumps((function, args))  # by value: torch's own way between processes is shared memory
    processes, pipes, results = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                here, there = _FORKSERVER.Pipe()
                world = World(rank, rank, world_size, world_size)
                process = _FORKSERVER.Process(target=_rank, args=(world, Path(folder) / "store", job, there))
                process.start()
                there.close()
                processes.append(process)
                pipes.append(here)
            deadline = time.monotonic() + TOTAL_SECONDS
            while len(results) < world_size:
                waiting_for = [pipes[rank] for rank in range(world_size) if rank not in results]
                ready = wait(waiting_for, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(world_size) if rank not in results]
                    raise TimeoutError(f"ranks {missing} have not returned after {TOTAL_SECONDS} s")
                for pipe in ready:
                    rank = pipes.index(pipe)
                    results[rank] = _receive(pipe, rank)
            for process in processes:
                process.join(COLLECTIVE_SECONDS)
        finally:
            for process, pipe in zip(processes, pipes, strict=True):
                process.kill()
                process.join()
                process.close()
                pipe.close()
    return [results[rank] for rank in range(world_size)]


def on_two_hosts(world):
    """The place of a rank of two hosts with half of the ranks each."""
    half = world.world_size // 2
    return dataclasses.replace(world, local_rank=world.rank % half, local_world_size=half)


def _receive(pipe: Connection, rank: int):
    try:
        result, error, trace = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} ended without a result") from None
    if trace is None:
        return result
    error = error or RuntimeError(f"rank {rank} failed")
    error.add_note(f"On rank {rank}:\n{trace}")
    raise error


def _rank(world: World, store: Path, job: bytes, pipe: Connection) -> None:
    """One rank's process."""
    torch.set_num_threads(1)
    try:
        if world.world_size > 1:
            dist.init_process_group(
                "gloo", store=dist.FileStore(str(store), world.world_size), rank=world.rank,
                world_size=world.world_size, timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            )  # fmt: skip
        function, args = pickle.loads(job)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(world, *args)
        message = pickle.dumps((result, None, None))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            message = pickle.dumps((None, error, trace))
            pickle.loads(message)
        except Exception:
            message = pickle.dumps((None, None, trace))
        pipe.send_bytes(message)
        pipe.poll(None)  # stay until killed, so that no other rank fails for the loss of this one
        return
    pipe.send_bytes(message)
    if world.world_size > 1:
        dist.destroy_process_group()
