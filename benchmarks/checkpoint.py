"""How long a checkpoint keeps a training waiting: written while it waits, and on a thread of its own.

    python -m benchmarks.checkpoint [--rounds 5] [--arch resnet50] [--folder FOLDER] [--quick]

An encoder with its key encoder, momentum and a queue of 65,536 keys, on one process. The two ways take turns.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import results
from moco_dist.config.architectures import ARCHITECTURES
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.method.build import build_method
from moco_dist.run import checkpoint
from moco_dist.run.saver import Saver


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="checkpoints of each kind (default 5)")
    parser.add_argument("--folder", type=Path, help="file system to write to (default: that of temporary files)")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet50")
    args = results.parse(parser, rounds=1, arch="resnet10")
    world = World(device="cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    config = PretrainConfig.model_validate(
        {
            "run": {"dir": folder},
            "data": {"root": "unused"},
            "model": {"arch": args.arch},
            "checkpoint": {"keep_last": 1},
        }
    )
    method = build_method(config, world)
    saver = Saver(config, {}, 0, -1, world, print)
    stalls, totals = {"synchronous": [], "asynchronous": []}, []
    try:
        for _ in range(args.rounds):
            started = time.perf_counter()
            checkpoint.write(checkpoint.snapshot(method, {}, world), folder, world)
            stalls["synchronous"].append(time.perf_counter() - started)
            method.step += 1
            started = time.perf_counter()
            saver.save(method, [])
            stalls["asynchronous"].append(time.perf_counter() - started)
            saver.finish()
            totals.append(time.perf_counter() - started)
            method.step += 1
        size = sum(path.stat().st_size for path in checkpoint.latest(folder).iterdir())
    finally:
        shutil.rmtree(folder)
    median = {kind: statistics.median(seconds) for kind, seconds in stalls.items()}
    rows = [
        {"kind": kind, "stall_seconds": median[kind], "all_stall_seconds": seconds} for kind, seconds in stalls.items()
    ]
    ratio = median["synchronous"] / median["asynchronous"]
    results.write(
        "checkpoint", rows, world.device, arch=args.arch, bytes=size, stall_ratio_of_medians=ratio,
        asynchronous_total_seconds=statistics.median(totals),
    )  # fmt: skip
    for row in rows:
        print(f"{row['kind']}: waits {row['stall_seconds']:.2f} s for {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
