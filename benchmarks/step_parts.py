"""Where a step's time goes, beside a supervised step of the same ResNet, and beside its floors.

    python -m benchmarks.step_parts [--arch resnet50] [--image-size 224] [--batches 32 64] [--ways eager compile graphs]
        [--repeats 3] [--earlier drop|keep|replace] [--quick]

One rank, MoCo v2's settings, precision by the program's default for the device. Whole steps of MoCo and of supervised
training (same engine, same optimiser, cross-entropy over 1,000 classes) take turns; medians. The parts come from steps
of their own, between which the device is waited for; that makes a step a little longer, so parts are given as
shares of their sum.

The ceiling: a supervised step is a forward and a backward pass of twice its work, 3 forwards; MoCo's key forward makes
it 4. So MoCo's images/s can be 3/4 of the supervised.

The floors: the FLOPs of the encoders' convolutions and products / the rate of a large matrix product in the same
precision, and the bytes of momentum update and optimiser / the bandwidth of `y += x` on large arrays; both rates are
measured in the same run.

"Data wait" is of another loop: the program's loader on images of 500 x 375 (benchmarks/photos.py), with all cores but
one, feeding the same step. On CPUs it competes with the step for the cores.

On a GPU all local batches 32, 64, 128, 256 and all ways; on a CPU batch 32, eager (three minutes on two cores).
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import results
from benchmarks.photos import make_photos, source_of_photos
from benchmarks.timing import bytes_per_second, flops_per_second, in_turn, synchronise
from moco_dist.config.architectures import ARCHITECTURES
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.distributed.world import World
from moco_dist.engine.ddp import DDPEngine
from moco_dist.engine.optimizer import build_optimizer
from moco_dist.engine.precision import compute_dtype
from moco_dist.method import moco
from moco_dist.method.encoder import build_encoder
from moco_dist.method.queue import Queue
from moco_dist.planning.random_step import Marks, RandomStep

CLASSES = 1000
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compile": {"compile": "step"},
    "graphs": {"compile": "step", "cuda_graphs": True},
}
# Functions of the step, and the part that each is: what is left of a step is "other".
PARTS = {
    (moco, "momentum_update"): "momentum update",
    (moco.MoCo, "_encode_keys"): "key forward",
    (moco, "gather_and_unshuffle"): "loss and queue",
    (moco, "info_nce"): "loss and queue",
    (Queue, "enqueue"): "loss and queue",
}
MOMENTUM_BYTES, SGD_BYTES = 12, 20  # of a float32 parameter


def settings(arch: str, image_size: int, local_batch: int, way: str, root: str) -> PretrainConfig:
    """MoCo v2's, for one rank."""
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    return PretrainConfig.model_validate({
        "run": {"dir": "unused"},
        "data": {"root": root, "image_size": image_size, "num_workers": workers},
        "model": {"arch": arch, "bn_group_size": 32},
        "optim": {"global_batch_size": local_batch},
        "engine": WAYS[way],
    })  # fmt: skip


class Supervised:
    """A step of training with labels: forward, backward, optimiser, on views that have their colours already."""

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self._encoder = build_encoder(config.model, 0)
        self._encoder.head = nn.Sequential(nn.Linear(self._encoder.feature_dim, CLASSES))
        model = nn.Sequential(self._encoder.backbone, self._encoder.head).to(world.device)
        dtype = compute_dtype(config.optim.precision, world.device)
        self._engine = DDPEngine(model, build_optimizer(model, config.optim), dtype, config.engine, world)
        self._has_graphs = config.engine.cuda_graphs
        batch, side = config.optim.global_batch_size, config.data.image_size
        self._images = torch.randn(batch, 3, side, side, device=world.device).to(memory_format=torch.channels_last)
        self._labels = torch.randint(CLASSES, (batch,), device=world.device)

    def step(self) -> None:
        """One."""
        if self._has_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # a step of its own, not the rest of the one before
        self._engine.backward(F.cross_entropy(self._engine(self._images).float(), self._labels))
        self._engine.step(0.0)


def seconds_of_parts(step: RandomStep) -> dict[str, float]:
    """Seconds of one step by part, the device being waited for between them."""
    marks = step.marks()
    with marked(marks):
        return step.seconds_of_parts(marks, "other")


def wait_share(step: RandomStep, world: World, steps: int) -> float:
    """Share of the loop spent waiting for the loader, after two steps that are not counted."""
    config = step.config
    folder = find_images(config.data.root, "train")
    plan = Plan(len(folder.paths), config.optim.global_batch_size, 0)
    waited = started = 0.0
    with closing(pretrain_batches(folder, config, plan, world, 0, steps + 2)) as batches:
        for number in range(steps + 2):
            asked = time.perf_counter()
            batch = next(batches).to(torch.device(world.device))
            if number == 2:
                synchronise(world.device)
                waited, started = 0.0, asked
            waited += time.perf_counter() - asked
            step.step(batch)
    synchronise(world.device)
    return waited / (time.perf_counter() - started)


@contextmanager
def marked(marks: Marks) -> Iterator[None]:
    """`train_step` with the functions of PARTS timed."""
    with ExitStack() as patches:
        for (owner, name), part in PARTS.items():
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), marks, part)))
        yield


def timed(function: Callable, marks: Marks, part: str) -> Callable:
    """`function`, its seconds added to a part."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with marks.part(part):
            return function(*args, **kwargs)

    return call


def measure(config: PretrainConfig, way: str, repeats: int, world: World) -> dict[str, Any]:
    """One row."""
    moco = RandomStep(config, config.optim.global_batch_size, world.device)
    supervised = Supervised(config, world)
    moco.step()  # compiles
    seconds = in_turn({"moco": moco.step, "supervised": supervised.step}, repeats, world.device)
    readings = [seconds_of_parts(moco) for _ in range(repeats + 1)][1:]
    parts = {name: statistics.median(reading[name] for reading in readings) for name in readings[0]}
    count = config.optim.global_batch_size
    parameters = sum(p.numel() for p in moco.method.query_encoder.parameters())
    dtype = compute_dtype(config.optim.precision, world.device)
    floors = {
        "convolutions and products": flops(config, world) / flops_per_second(world.device, dtype),
        "momentum update and optimiser": (MOMENTUM_BYTES + SGD_BYTES) * parameters / bytes_per_second(world.device),
    }
    total = sum(parts.values())
    return {
        "way": way, "local_batch": count, "seconds": seconds, "images_per_second": count / seconds["moco"],
        "share_of_ceiling": seconds["supervised"] / 0.75 / seconds["moco"],
        "share_of_step": {name: value / total for name, value in parts.items()}, "floor_seconds": floors,
        "data_wait_share": wait_share(moco, world, repeats),
    }  # fmt: skip


def flops(config: PretrainConfig, world: World) -> int:
    """Of the products and convolutions of one step's encoders, counted on an eager copy."""
    values = config.model_dump(mode="json")
    eager = PretrainConfig.model_validate({**values, "engine": {}})
    step = RandomStep(eager, eager.optim.global_batch_size, world.device)
    counter = FlopCounterMode(display=False)
    with counter:
        step.step()
    return counter.get_total_flops()


def main() -> None:
    """Measure and write the results file."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256] if on_gpu else [32])
    parser.add_argument("--ways", choices=list(WAYS), nargs="+", default=list(WAYS) if on_gpu else ["eager"])
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 3)
    results.add_earlier(parser)
    args = results.parse(parser, ways=["eager"], arch="resnet10", image_size=32, batches=[32], repeats=1)
    world = World(device="cuda" if on_gpu else "cpu")
    facts = {"arch": args.arch, "image_size": args.image_size, "threads": torch.get_num_threads(),
             "cut_out_of": source_of_photos()}  # fmt: skip
    cases = [(way, batch) for way in args.ways for batch in args.batches]
    rows = [] if args.earlier == "drop" else results.earlier_rows("step_parts", world.device, **facts)
    if args.earlier == "replace":
        rows = [row for row in rows if (row["way"], row["local_batch"]) not in cases]
    with tempfile.TemporaryDirectory() as scratch:
        make_photos(Path(scratch), 2 * max(args.batches))
        for way, batch in cases:
            if (way, batch) in [(row["way"], row["local_batch"]) for row in rows]:
                continue
            torch.compiler.reset()
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()  # CUDA graphs keep memory of their own, which the next case needs
            row = measure(settings(args.arch, args.image_size, batch, way, scratch), way, args.repeats, world)
            rows.append(row)
            print(row, flush=True)
            results.write("step_parts", rows, world.device, **facts)


if __name__ == "__main__":
    main()
