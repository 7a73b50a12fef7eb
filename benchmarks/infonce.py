"""InfoNCE alone: forward and gradient by q, this program's against `cat` + `cross_entropy`.

    python -m benchmarks.infonce [--repeats 3] [--quick]

For each number of queries N and queue size K: seconds (medians, in turn), peak memory beside the inputs, and the
largest error of the gradient against float64, relative to its largest value. On a GPU also with TF32 products
(`engine.allow_tf32`). Where the N x (1 + K) logits would not fit the machine, the usual way is left out. Five minutes
on two cores.
"""

import argparse
import ctypes
import functools
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results
from benchmarks.timing import in_turn
from moco_dist.distributed.world import World
from moco_dist.method.infonce import info_nce

DIM, TEMPERATURE = 128, 0.2
SIZES = [(n, k) for k in (65536, 1 << 20, 1 << 22) for n in (32, 256, 1024, 4096)]
MOST_ON_CPU = 1 << 32  # N K: ten seconds a call
QUICK_SIZES = [(32, 4096)]


def unit_rows(rows: int, device: str) -> Tensor:
    """(rows, C) random unit vectors."""
    return F.normalize(torch.randn(rows, DIM, device=device), dim=1)


def fused(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """The gradient by q, by this program's loss."""
    q = q.detach().requires_grad_()
    info_nce(q, k, q.detach(), queue, TEMPERATURE, World(device=str(q.device))).backward()
    assert q.grad is not None
    return q.grad


def fused_tf32(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """As `fused`, with TF32 products."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return fused(q, k, queue)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def usual(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """The gradient by q, by logits and cross-entropy."""
    q = q.detach().requires_grad_()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / TEMPERATURE
    F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device)).backward()
    assert q.grad is not None
    return q.grad


def peak_bytes(function, device: str) -> int:
    """Peak of memory during a call, beyond what was held before it. On a CPU the process's, to a few MB."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is not to be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = psutil.Process().memory_info().rss
    function()
    status = Path("/proc/self/status").read_text()
    return max(0, int(status.split("VmHWM:")[1].split()[0]) * 1024 - before)


def measure(num_queries: int, num_keys: int, repeats: int, device: str) -> dict[str, Any]:
    """One row."""
    q, k, queue = unit_rows(num_queries, device), unit_rows(num_queries, device), unit_rows(num_keys, device)
    ways = {"moco_dist": fused, "moco_dist, TF32": fused_tf32, "cat + cross_entropy": usual}
    if torch.device(device).type == "cpu":
        del ways["moco_dist, TF32"]
    room = torch.cuda.mem_get_info()[0] if torch.device(device).type == "cuda" else psutil.virtual_memory().available
    if 6 * 4 * num_queries * num_keys > room:  # logits, their quotient, softmax and gradients
        del ways["cat + cross_entropy"]
    calls = {name: functools.partial(way, q, k, queue) for name, way in ways.items()}
    some = slice(0, 32)  # rows of the gradient do not depend on one another: a few tell the error
    exact = usual(q[some].double(), k[some].double(), queue.double()) * min(32, num_queries) / num_queries
    peak = {name: peak_bytes(call, device) for name, call in calls.items()}
    error = {name: ((call()[some] - exact).abs().max() / exact.abs().max()).item() for name, call in calls.items()}
    return {"num_queries": num_queries, "num_keys": num_keys, "seconds": in_turn(calls, repeats, device),
            "peak_bytes": peak, "relative_error": error}  # fmt: skip


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = results.parse(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    sizes = QUICK_SIZES if args.quick else SIZES
    for size in sizes if device == "cuda" else [(n, k) for n, k in sizes if n * k <= MOST_ON_CPU]:
        row = measure(*size, args.repeats, device)
        rows.append(row)
        print(row, flush=True)
    results.write("infonce", rows, device, dim=DIM, dtype="float32", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
