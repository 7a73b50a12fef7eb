"""Bytes and seconds of a step between hosts, for each way to exchange key views.

    sudo python -m benchmarks.network [--hosts 2] [--steps 5] [--rates 1,10]

Hosts are network namespaces of this machine (benchmarks/hosts.py), one rank each, their links shaped. Bytes are read
from the interfaces, headers included; beside them stands the arithmetic. Gradients are the same in all three ways, so
bytes are read without their all-reduce ("features and images") and with it. Seconds are medians over steps; the ways
take turns within a step, so that a busy machine slows them alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.hosts import hosts, why_not
from moco_dist.config import PretrainConfig
from moco_dist.data.exchange import key_views
from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import barrier, process_group
from moco_dist.distributed.world import World, world_from_env
from moco_dist.train import build, train_step

EXCHANGES = ("loader", "all_to_all", "all_gather")
LOCAL_BATCH = 32
SIDE = 224
PORT = 29400


def config_of(exchange: str, world_size: int) -> PretrainConfig:
    """ResNet-18 at 224 px, 32 images a rank: the bytes of images and features do not depend on the architecture."""
    return PretrainConfig.model_validate({
        "run": {"dir": "unused"},
        "data": {"root": "unused", "image_size": SIDE},
        "model": {"arch": "resnet18", "head_hidden_dims": [512]},
        "moco": {"queue_size": 65536},
        "optim": {"global_batch_size": LOCAL_BATCH * world_size, "precision": "bf16"},
        "shuffle": {"exchange": exchange},
    })  # fmt: skip


def predicted_bytes(exchange: str, world_size: int, dim: int) -> dict[str, int]:
    """What a rank receives in a step beside the gradients, without headers."""
    others, n = world_size - 1, LOCAL_BATCH
    pixels = 3 * SIDE * SIDE
    return {
        "images": {"loader": 0, "all_to_all": others * n * pixels // world_size, "all_gather": others * n * pixels * 4}[
            exchange
        ],
        "features": others * n * 2 * dim * 4 + others * n * (dim + 1) * 4,
    }


def rank_main(steps: int) -> None:
    """One host's rank: each way in turn, `steps` times, with and without the gradients' all-reduce."""
    world = world_from_env("cpu")
    torch.set_num_threads(1)
    counter = Path("/sys/class/net/eth0/statistics/rx_bytes")
    with process_group(world):
        runs = {exchange: Run(exchange, world) for exchange in EXCHANGES}
        rows = []
        for step in range(-1, steps):
            for exchange, run in runs.items():
                for gradients in (False, True):
                    barrier(world)
                    before, started = int(counter.read_text()), time.perf_counter()
                    exchange_seconds = run.step(max(step, 0), gradients)
                    seconds = time.perf_counter() - started
                    barrier(world)
                    received = int(counter.read_text()) - before
                    if step >= 0:
                        rows.append({"exchange": exchange, "gradients": gradients, "bytes": received,
                                     "seconds": seconds, "exchange_seconds": exchange_seconds})  # fmt: skip
        if world.is_main:
            print(json.dumps(rows))


class Run:
    """A program of its own for one way to exchange, on random crops made once."""

    def __init__(self, exchange: str, world: World) -> None:
        from moco_dist.data import counter_rng
        from moco_dist.data.augment import draw_colours
        from moco_dist.data.batch import CropBatch

        self.world, self.config = world, config_of(exchange, world.world_size)
        self.plan = Plan(10_000, self.config.optim.global_batch_size, 0)
        self.state, self.engine = build(self.config, world)
        samples = torch.from_numpy(self.plan.query_indices(0, world))
        crops = torch.randint(0, 256, (LOCAL_BATCH, SIDE, SIDE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        colours = draw_colours(self.config.augment, 0, 0, samples.numpy(), counter_rng.STREAM_COLOUR_K)
        self.batch = CropBatch(crops, crops, samples, samples, colours, colours)

    def step(self, step: int, gradients: bool) -> float:
        """One step; returns the seconds that making the key views took."""
        started = time.perf_counter()
        view_k = key_views(self.batch, self.config, self.plan, step, self.world, torch.bfloat16)
        seconds = time.perf_counter() - started
        view_q = view_k.roll(1, 0)
        order = torch.from_numpy(self.plan.key_permutation(step))
        engine = self.engine if gradients else _WithoutAllReduce(self.engine)
        train_step(self.state, engine, self.config, view_q, view_k, order, 0.0, False, self.world)
        return seconds


class _WithoutAllReduce:
    """The engine, its gradients kept on their rank."""

    def __init__(self, engine) -> None:
        self._engine = engine

    def __call__(self, images, synchronise=True):
        return self._engine(images, synchronise=False)

    def __getattr__(self, name):
        return getattr(self._engine, name)


def measure(num_hosts: int, steps: int, rates: list[float]) -> list[dict]:
    """A row for each rate and way."""
    rows = []
    with hosts(num_hosts) as made:
        for rate in rates:
            made.shape(rate)
            ranks = []
            with tempfile.TemporaryFile("w+") as out:
                for host in range(num_hosts):
                    env = {**os.environ, "RANK": str(host), "WORLD_SIZE": str(num_hosts), "LOCAL_RANK": "0",
                           "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": made.address(0), "MASTER_PORT": str(PORT),
                           "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}  # fmt: skip
                    words = [sys.executable, "-m", "benchmarks.network", "--rank-steps", str(steps)]
                    stdout = out if host == 0 else subprocess.DEVNULL
                    ranks.append(subprocess.Popen(made.command(host, words), env=env, stdout=stdout))
                if any(rank.wait() for rank in ranks):
                    raise SystemExit("a rank failed")
                out.seek(0)
                readings = json.loads(out.read().splitlines()[-1])
            rows += [summary(readings, exchange, num_hosts, rate) for exchange in EXCHANGES]
            print_rows(rows[-len(EXCHANGES):])
    return rows


def summary(readings: list[dict], exchange: str, world_size: int, rate: float) -> dict:
    """Medians of one way at one rate, beside the arithmetic."""

    def median(key: str, gradients: bool) -> float:
        chosen = [r[key] for r in readings if r["exchange"] == exchange and r["gradients"] == gradients]
        return statistics.median(chosen)

    predicted = predicted_bytes(exchange, world_size, 128)
    return {
        "hosts": world_size, "gigabit_per_second": rate, "exchange": exchange,
        "received_bytes": median("bytes", False), "predicted_bytes": sum(predicted.values()),
        "predicted_image_bytes": predicted["images"], "received_bytes_with_gradients": median("bytes", True),
        "step_seconds": median("seconds", True), "step_seconds_without_gradients": median("seconds", False),
        "key_views_seconds": median("exchange_seconds", True),
    }  # fmt: skip


def print_rows(rows: list[dict]) -> None:
    """For a person."""
    for row in rows:
        print(
            f"{row['hosts']} hosts {row['gigabit_per_second']:g} Gb/s {row['exchange']:>10}: received "
            f"{row['received_bytes'] / 1e6:.3f} MB a step (predicted {row['predicted_bytes'] / 1e6:.3f}), "
            f"with gradients {row['received_bytes_with_gradients'] / 1e6:.1f} MB; step {row['step_seconds']:.2f} s, "
            f"of it key views {row['key_views_seconds']:.2f} s"
        )


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="2", help="numbers of hosts, e.g. 2,4")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rates", default="1,10", help="link rates in Gb/s")
    parser.add_argument("--rank-steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_steps is not None:
        rank_main(args.rank_steps)
        return
    if reason := why_not():
        raise SystemExit(reason)
    rates = [float(rate) for rate in args.rates.split(",")]
    rows = [row for n in args.hosts.split(",") for row in measure(int(n), args.steps, rates)]
    results.write("network", rows, local_batch_size=LOCAL_BATCH, image_size=SIDE, arch="resnet18", precision="bf16")


if __name__ == "__main__":
    main()
