"""Bytes and seconds of a step between hosts, for each way to exchange key views.

    sudo python -m benchmarks.network [--hosts 2,4] [--steps 3] [--rates 1] [--quick]

Hosts are network namespaces of this machine (benchmarks/hosts.py), their links shaped: hosts of one rank, whose blocks
of the shuffle lie on all of them, and two hosts of two ranks, with blocks that fit a host and blocks that do not. Bytes
are read from the interfaces, headers included, as the mean over hosts; beside them stands the arithmetic. Gradients are
the same in all ways, so bytes are read without their all-reduce (features and images) and with it. Seconds are medians
over steps; the ways take turns within a step, so that a busy machine slows them alike. One rate is measured, since the
bytes are the same at every rate; `--rates 1,10` takes twice as long.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks import results
from benchmarks.hosts import Hosts, hosts, received_bytes, why_not
from benchmarks.ranks import run_ranks
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import counter_rng
from moco_dist.data.batch import CropBatch
from moco_dist.data.colours import draw_colours
from moco_dist.data.key_views import KeyExchange
from moco_dist.data.plan import plan_of
from moco_dist.data.tasks import view_task
from moco_dist.data.views import Views
from moco_dist.distributed.collectives import barrier
from moco_dist.distributed.world import World
from moco_dist.method.build import build_method

# ranks a host: (shuffle.exchange, whether a block fits a host; else it is the whole batch)
CASES = {
    1: [("loader", False), ("all_to_all", False), ("all_gather", False)],
    2: [("auto", True), ("auto", False), ("all_to_all", False)],
}
LOCAL_BATCH = 32
# The bytes of images and features do not depend on the architecture and the queue.
FULL = {"arch": "resnet18", "image_size": 224, "queue_size": 65536}
QUICK = {"arch": "resnet10", "image_size": 48, "queue_size": 512}


def config_of(
    exchange: str, block: int, world_size: int, arch: str, image_size: int, queue_size: int
) -> PretrainConfig:
    """32 images a rank."""
    return PretrainConfig.model_validate({
        "run": {"dir": "unused"},
        "data": {"root": "unused", "image_size": image_size},
        "model": {"arch": arch, "head_hidden_dims": [512]},
        "moco": {"queue_size": queue_size},
        "optim": {"global_batch_size": LOCAL_BATCH * world_size},
        "shuffle": {"exchange": exchange, "block_size": block},
    })  # fmt: skip


def predicted_bytes(run: "Run", step: int) -> tuple[int, int]:
    """What comes into a host of images and of features in a step, without gradients and headers."""
    world, config = run.world, run.config
    local, size = world.local_world_size, world.world_size
    side, dim = config.data.image_size, config.model.embedding_dim
    images = 0
    if config.shuffle.exchange == "all_to_all":  # as many as the permutation sends
        host = range(world.rank // local * local, (world.rank // local + 1) * local)
        for rank in host:
            route = run.plan.key_route(step, replace(world, rank=rank, local_rank=rank % local), run.mates)
            counts = dict(zip(run.mates, route.receive_counts, strict=True))
            images += sum(n for mate, n in counts.items() if mate not in host) * 3 * side**2
    if config.shuffle.exchange == "all_gather":
        images = (size - 1) * LOCAL_BATCH * 3 * side**2 * 4
    queries_and_keys = (size - 1) * LOCAL_BATCH * 2 * dim * 4  # a ring
    sums = local * (size - local) * LOCAL_BATCH * (dim + 1) * 4  # from each rank of other hosts to each of this one
    return images, queries_and_keys + sums


def readings_of_rank(world: World, steps: int, **sizes: Any) -> list[dict[str, Any]]:
    """One rank's readings: each way in turn, `steps` times, with and without the gradients' all-reduce."""
    runs = {}
    for exchange, fits in CASES[world.local_world_size]:
        block = LOCAL_BATCH * (world.local_world_size if fits else world.world_size)
        runs[exchange, block] = Run(config_of(exchange, block, world.world_size, **sizes), world)
    rows = []
    for step in range(-1, steps):  # the first is not counted
        for (exchange, block), run in runs.items():
            for gradients in (False, True):
                barrier(world)
                before = received_bytes()
                barrier(world)  # no rank sends before all have read
                started = time.perf_counter()
                exchange_seconds = run.step(max(step, 0), gradients)
                seconds = time.perf_counter() - started
                barrier(world)
                received = received_bytes() - before
                if step >= 0:
                    images, features = predicted_bytes(run, step)
                    parameters = sum(p.nbytes for p in run.method.query_encoder.parameters())
                    rows.append({
                        "exchange": exchange, "block_size": block, "gradients": gradients, "received_bytes": received,
                        "predicted_image_bytes": images, "predicted_feature_bytes": features,
                        "predicted_gradient_bytes": 2 * (world.world_size - 1) * parameters // world.world_size,
                        "step_seconds": seconds, "key_views_seconds": exchange_seconds,
                    })  # fmt: skip
    return rows


class Run:
    """A program of its own for one way to exchange, on random crops made once."""

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self.world, self.config = world, config
        self.plan = plan_of(config, 10_000)
        self.keys = KeyExchange(config, self.plan, world)
        self.mates = self.keys.mates
        self.method = build_method(config, world)
        self.engine = self.method.engine
        samples = torch.from_numpy(self.plan.query_indices(0, world))
        side = config.data.image_size
        self.crops = torch.randint(0, 256, (3 * LOCAL_BATCH, 3, side, side), dtype=torch.uint8)
        colours = draw_colours(config.augment, 0, 0, samples.numpy(), counter_rng.STREAM_COLOUR_K)
        self.batch = CropBatch(self.crops[:LOCAL_BATCH], self.crops, samples, samples, colours, colours, samples)

    def step(self, step: int, gradients: bool) -> float:
        """One step; returns the seconds that making the key views took."""
        started = time.perf_counter()
        num_keys = view_task(step, self.config, self.plan, self.world).num_rows - LOCAL_BATCH
        batch = replace(self.batch, view_k=self.crops[:num_keys])
        (exchanged,) = self.keys.exchanged(iter([batch]), step)
        view_k = self.keys.coloured(exchanged, step, torch.float32)
        seconds = time.perf_counter() - started
        view_q = view_k.roll(1, 0)
        order = torch.from_numpy(self.plan.key_permutation(step))
        self.method.engine = self.engine if gradients else _WithoutAllReduce(self.engine)
        self.method.train_step(Views(view_q, view_k, order), 0.0, monitored=False)
        return seconds


class _WithoutAllReduce:
    """The engine, its gradients kept on their rank."""

    def __init__(self, engine) -> None:
        self._engine = engine

    def __call__(self, images, synchronise=True):
        return self._engine(images, synchronise=False)

    def __getattr__(self, name):
        return getattr(self._engine, name)


def measure(made: Hosts, rate: float, steps: int, ranks_a_host: int = 1, **sizes: Any) -> list[dict[str, Any]]:
    """A row for each way, on hosts whose links have `rate` Gb/s."""
    made.shape(rate)
    world_size = made.count * ranks_a_host
    of_ranks = run_ranks(readings_of_rank, world_size, made, ranks_a_host, steps=steps, **sizes)
    readings = [reading for rank in of_ranks for reading in rank]
    ways = dict.fromkeys((r["exchange"], r["block_size"]) for r in readings)
    facts = {"hosts": made.count, "ranks": world_size, "gigabit_per_second": rate}
    return [{**facts, **summary(readings, *way)} for way in ways]


def summary(readings: list[dict[str, Any]], exchange: str, block: int) -> dict[str, Any]:
    """Of all ranks and steps: means of bytes, which differ by host and step, and medians of seconds."""

    def of(key: str, gradients: bool) -> list[float]:
        return [r[key] for r in readings
                if (r["exchange"], r["block_size"], r["gradients"]) == (exchange, block, gradients)]  # fmt: skip

    predicted = {key: round(statistics.mean(of(key, True))) for key in
                 ("predicted_image_bytes", "predicted_feature_bytes", "predicted_gradient_bytes")}  # fmt: skip
    return {
        "exchange": exchange, "block_size": block,
        "received_bytes": round(statistics.mean(of("received_bytes", False))), **predicted,
        "received_bytes_with_gradients": round(statistics.mean(of("received_bytes", True))),
        "step_seconds": statistics.median(of("step_seconds", True)),
        "step_seconds_without_gradients": statistics.median(of("step_seconds", False)),
        "key_views_seconds": statistics.median(of("key_views_seconds", True)),
    }  # fmt: skip


def print_row(row: dict[str, Any]) -> None:
    """For a person."""
    predicted = row["predicted_image_bytes"] + row["predicted_feature_bytes"]
    print(
        f"{row['hosts']} hosts, {row['ranks']} ranks, {row['gigabit_per_second']:g} Gb/s, blocks of "
        f"{row['block_size']}, {row['exchange']:>10}: received "
        f"{row['received_bytes'] / 1e6:.3f} MB a step (predicted {predicted / 1e6:.3f}), with gradients "
        f"{row['received_bytes_with_gradients'] / 1e6:.1f} MB; step {row['step_seconds']:.2f} s, of it key views "
        f"{row['key_views_seconds']:.2f} s",
        flush=True,
    )


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="2,4", help="numbers of hosts")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rates", default="1", help="link rates in Gb/s")
    args = results.parse(parser, hosts="2", steps=1, rates="1")
    if reason := why_not():
        raise SystemExit(reason)
    sizes = QUICK if args.quick else FULL
    rows = []
    for count in map(int, args.hosts.split(",")):
        with hosts(count) as made:
            for rate in map(float, args.rates.split(",")):
                for ranks_a_host in (1, 2) if count == 2 else (1,):
                    measured = measure(made, rate, args.steps, **sizes, ranks_a_host=ranks_a_host)
                    for row in measured:
                        print_row(row)
                    rows += measured
    results.write("network", rows, local_batch_size=LOCAL_BATCH, precision="fp32", **sizes)


if __name__ == "__main__":
    main()
