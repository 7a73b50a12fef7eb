"""What `moco-dist plan` predicts, beside what then happens: seconds and bytes of a step on 1 and 2 hosts.

    sudo python -m benchmarks.plan_validation [--rates 1,0.1] [--steps 20] [--rounds 3] [--quick]

Hosts are network namespaces (benchmarks/hosts.py), one rank each, links shaped. Each case calibrates, plans with the
link's rate as a user would give it, and then takes real steps with the real loader. Calibration and steps take turns
`--rounds` times in one process, so that a busy machine slows both alike; the error is that of the ratio's median.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results
from benchmarks.hosts import hosts, received_bytes, why_not
from benchmarks.ranks import run_ranks
from moco_dist.config.pretrain import PretrainConfig, shuffle_block
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.data.views import views_of_steps
from moco_dist.datasets.shapes import ShapeSettings, draw_image
from moco_dist.distributed.collectives import barrier
from moco_dist.distributed.world import World
from moco_dist.method.build import build_method
from moco_dist.planning import calibrate
from moco_dist.planning.arithmetic import sizes
from moco_dist.planning.forecast import Forecast

CALIBRATION_STEPS = 10
PRECISION = "bf16"


def config_of(root: str, world_size: int, exchange: str, precision: str) -> PretrainConfig:
    """A small ResNet at 48 px, 32 images a rank, loaded in the training process."""
    return PretrainConfig.model_validate({
        "run": {"dir": "unused", "device": "cpu"},
        "data": {"root": root, "image_size": 48, "num_workers": 0},
        "model": {"arch": "resnet10", "head_hidden_dims": [512]},
        "moco": {"queue_size": 4096},
        "optim": {"global_batch_size": 32 * world_size, "precision": precision},
        "shuffle": {"exchange": exchange},
    })  # fmt: skip


def readings_of_rank(
    world: World, root: str, exchange: str, precision: str, rate: float, steps: int, rounds: int
) -> list[dict]:
    """One rank's readings: calibrates and plans, then runs, `rounds` times in turn."""
    torch.set_num_threads(1)
    calibrate.MAX_STEPS = min(CALIBRATION_STEPS, steps)
    config = config_of(root, world.world_size, exchange, precision)
    planned = sizes(config, world.world_size, 1)
    readings = []
    for number in range(rounds):
        measured = calibrate.calibrate(config, world.world_size, world)
        forecast = Forecast(planned, measured, rate * 1e9 / 8, measured.latency_seconds,
                            measured.loader_core_seconds, config.data.num_workers)  # fmt: skip
        seconds, received = take_steps(config, world, number, steps)
        readings.append({
            "predicted_seconds": forecast.step_seconds(), "measured_seconds": seconds,
            "predicted_bytes": sum(planned.received().values()), "measured_bytes": received,
            "parts": {"computing": forecast.compute_seconds, "network": forecast.waited_for_network(),
                      "loading": forecast.loading_seconds},
        })  # fmt: skip
    barrier(world)
    return readings


def take_steps(config: PretrainConfig, world: World, number: int, steps: int) -> tuple[float, float]:
    """Mean seconds and received bytes of `steps` real steps, the two before them left out."""
    folder = find_images(config.data.root, "train")
    plan = Plan(len(folder.paths), config.optim.global_batch_size, number, shuffle_block(config))
    method = build_method(config, world)
    started, before = 0.0, 0
    feed = views_of_steps(folder, config, plan, world, 0, steps + 2, method.dtype)
    for step in range(steps + 2):
        if step == 2:
            barrier(world)
            started, before = time.perf_counter(), received_bytes()
        views, _ = next(feed)
        method.train_step(views, 0.001, monitored=False)
    feed.close()
    seconds = (time.perf_counter() - started) / steps
    barrier(world)
    return seconds, (received_bytes() - before) / steps


def make_images(root: Path, count: int = 1000) -> None:
    """Generated shapes, of one class: labels do not matter here."""
    folder = root / "train" / "shapes"
    folder.mkdir(parents=True)
    for number in range(count):
        draw_image(number % 10, np.random.default_rng(number), ShapeSettings()).save(folder / f"{number:04d}.jpg")


def measure(
    root: str, num_hosts: int, exchange: str, rate: float, precision: str, steps: int, rounds: int
) -> dict[str, Any]:
    """A row: one case on fresh hosts."""
    case = {"root": root, "exchange": exchange, "precision": precision, "rate": rate, "steps": steps, "rounds": rounds}
    with hosts(num_hosts) as made:
        made.shape(rate)
        readings = run_ranks(readings_of_rank, num_hosts, made, **case)[0]
    ratios = [r["predicted_seconds"] / r["measured_seconds"] for r in readings]
    middle = sorted(readings, key=lambda r: r["predicted_seconds"] / r["measured_seconds"])[len(readings) // 2]
    row = {
        "hosts": num_hosts, "gigabit_per_second": rate, "exchange": exchange, **middle,
        "seconds_error_percent": 100 * (statistics.median(ratios) - 1),
        "seconds_error_percent_of_rounds": [round(100 * (ratio - 1), 1) for ratio in ratios],
        "bytes_error_percent": 100 * (middle["predicted_bytes"] / middle["measured_bytes"] - 1)
        if num_hosts > 1 else None,
    }  # fmt: skip
    print(
        f"{num_hosts} host(s) {rate:g} Gb/s {exchange}: predicted {row['predicted_seconds']:.3f} s, measured "
        f"{row['measured_seconds']:.3f} s, error {row['seconds_error_percent']:+.1f} %; bytes predicted "
        f"{row['predicted_bytes'] / 1e6:.2f} MB, measured {row['measured_bytes'] / 1e6:.2f} MB",
        flush=True,
    )
    return row


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="1,0.1", help="link rates in Gb/s")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = results.parse(parser, rates="1", steps=2, rounds=1)
    if reason := why_not():
        raise SystemExit(reason)
    first, *_ = rates = [float(rate) for rate in args.rates.split(",")]
    with tempfile.TemporaryDirectory() as root:
        make_images(Path(root))
        cases = [(1, "loader", first), *((2, "loader", rate) for rate in rates), (2, "all_gather", rates[-1])]
        cases = cases[1:2] if args.quick else cases
        precision = "fp32" if args.quick else PRECISION  # which every CPU is quick at
        rows = [measure(root, *case, precision, args.steps, args.rounds) for case in cases]
    results.write("plan_validation", rows, arch="resnet10", image_size=48, local_batch_size=32, precision=PRECISION)


if __name__ == "__main__":
    main()
