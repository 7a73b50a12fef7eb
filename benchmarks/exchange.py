"""What loading costs a rank by `shuffle.exchange` and world size, in CPU milliseconds a source image.

    python -m benchmarks.exchange [--images 512] [--rounds 5] [--batch 256] [--ranks 1 2 8] [--quick]

Real ranks on loopback, which load and exchange a batch of images of about 500 x 375, two 224-px crops each, blocks
of 256 samples. The figure is CPU time of all ranks' processes, the exchange by gloo included, a source image: other
load on the machine matters little. The ways of a world size take turns in one run; medians over the rounds, and their
ratios to `loader`, by which keys are decoded where they are encoded. Two hosts of four ranks are a plan for such hosts
here, so that what `auto` would not send is decoded. Images: benchmarks/photos.py.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.loader import SIZE
from benchmarks.photos import HEIGHT, WIDTH, make_photos, source_of_photos
from benchmarks.ranks import run_ranks
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.key_views import KeyExchange
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import plan_of
from moco_dist.data.sources import find_images
from moco_dist.data.traffic import key_traffic
from moco_dist.distributed.collectives import barrier
from moco_dist.distributed.world import World

STEPS = 2  # of a reading
WAYS = {  # ranks: (ranks a host, shuffle.exchange)
    1: [(1, "auto")],
    2: [(2, "loader"), (2, "auto")],
    8: [(8, "loader"), (8, "auto"), (4, "auto")],
}


def config_of(root: str, exchange: str, batch: int) -> PretrainConfig:
    """Loaded in the ranks' own processes."""
    return PretrainConfig.model_validate({
        "run": {"dir": "unused"}, "data": {"root": root, "image_size": SIZE, "num_workers": 0},
        "optim": {"global_batch_size": batch}, "shuffle": {"exchange": exchange},
    })  # fmt: skip


def readings_of_rank(world: World, root: str, rounds: int, batch: int) -> list[list[float]]:
    """CPU seconds of this rank for STEPS batches: a list for each way of this world size, the first round left out."""
    torch.set_num_threads(1)  # a second thread spins while it waits, and its CPU time would count as loading
    ways = []
    for ranks_a_host, exchange in WAYS[world.world_size]:
        config = config_of(root, exchange, batch)
        folder = find_images(config.data.root, "train")
        placed = replace(world, local_world_size=ranks_a_host, local_rank=world.rank % ranks_a_host)
        plan = plan_of(config, len(folder.paths))
        ways.append((folder, config, plan, placed, KeyExchange(config, plan, placed)))
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for found, (folder, config, plan, placed, keys) in zip(seconds, ways, strict=True):
            barrier(world)
            started = time.process_time()
            for _ in keys.exchanged(pretrain_batches(folder, config, plan, placed, number, number + STEPS), number):
                pass
            found.append(time.process_time() - started)
    return [found[1:] for found in seconds]


def rows_of(root: str, world_size: int, rounds: int, batch: int) -> list[dict[str, Any]]:
    """A row for each way."""
    of_ranks = run_ranks(readings_of_rank, world_size, root=root, rounds=rounds, batch=batch)
    rows = []
    for way, (ranks_a_host, exchange) in enumerate(WAYS[world_size]):
        ms = [1000 * sum(rank[way][number] for rank in of_ranks) / (STEPS * batch) for number in range(rounds)]
        traffic = key_traffic(config_of(root, exchange, batch), batch // world_size, world_size, ranks_a_host)
        rows.append({
            "ranks": world_size, "hosts": world_size // ranks_a_host, "exchange": exchange,
            "cpu_ms_per_image": round(statistics.median(ms), 3), "lowest": round(min(ms), 3),
            "highest": round(max(ms), 3), "decodes_per_sample": traffic.decodes,
            "received_bytes": traffic.received_bytes,
        })  # fmt: skip
    for row in rows:  # the first way of several is `loader`
        row["times_loader"] = round(row["cpu_ms_per_image"] / rows[0]["cpu_ms_per_image"], 3) if len(rows) > 1 else None
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256, help="of all ranks")
    parser.add_argument("--ranks", type=int, nargs="+", choices=list(WAYS), default=list(WAYS))
    args = results.parse(parser, images=128, batch=64, rounds=1, ranks=[2])
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "photos"
        mean_bytes = make_photos(root, args.images)
        rows = [row for world_size in args.ranks for row in rows_of(str(root), world_size, args.rounds, args.batch)]
    results.write("exchange", rows, images=args.images, rounds=args.rounds, global_batch_size=args.batch,
                  crop_size=SIZE, image_size=[WIDTH, HEIGHT], mean_file_bytes=round(mean_bytes),
                  cut_out_of=source_of_photos())  # fmt: skip


if __name__ == "__main__":
    main()
