"""A step of this program beside the same step of lightly's MoCo: two ranks on loopback and over a 1 Gb/s link, or one.

    pip install 'moco_dist[benchmarks]'
    sudo python -m benchmarks.peer_step [--rounds 2] [--ranks 2] [--arch resnet50] [--local-batches 32]
        [--image-size 224] [--quick]

Both do the same work: architecture, head, batch, image size, queue, temperature, precision (float32 on CPUs, bf16
autocast on GPUs), shuffled BN over ranks, SGD with momentum and weight decay, DistributedDataParallel. lightly's step
is put together from its own parts in the order of its MoCo v2 benchmark: `update_momentum`, `batch_shuffle` (gathers
all images), `batch_unshuffle`, `NTXentLoss` with a gathered memory bank, and torch's defaults for DDP and SGD. It runs
twice: with tensors as torch lays them out (as published), and in channels-last, which this program uses, so that the
reader sees how much of the difference that makes. Views are made before the clock starts, for all alike: augmentation
is not compared.

Each program has processes of its own, as its user would start it; they take turns, `--rounds` times, each with one step
that is not counted and three that are (20 on a GPU). A step ends when the last rank is done; ratios are of medians.
Without root (or iproute2) only loopback is measured; one rank needs no link. Where there is a GPU for each rank, they
use them. Twelve minutes on two cores.
"""

import argparse
import itertools
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import results
from benchmarks.hosts import hosts, why_not
from benchmarks.ranks import run_ranks
from benchmarks.timing import synchronise
from moco_dist.config.architectures import ARCHITECTURES
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.plan import Plan
from moco_dist.data.views import Views
from moco_dist.distributed.collectives import barrier
from moco_dist.distributed.world import World
from moco_dist.engine.precision import autocast, compute_dtype
from moco_dist.method.backbone import build_resnet
from moco_dist.method.build import build_method

LR, MOMENTUM, TEMPERATURE, DIM = 0.03, 0.999, 0.2, 128
PROGRAMS = ("moco_dist", "lightly", "lightly channels-last")


class Ours:
    """This program's step, key views loaded (`shuffle.exchange: loader`)."""

    def __init__(self, world: World, arch: str, local_batch: int, image_size: int, queue_size: int) -> None:
        self.world = world
        self.config = PretrainConfig.model_validate({
            "run": {"dir": "unused"},
            "data": {"root": "unused", "image_size": image_size},
            "model": {"arch": arch, "bn_group_size": local_batch},
            "moco": {"queue_size": queue_size},
            "optim": {"global_batch_size": local_batch * world.world_size},
        })  # fmt: skip
        self.plan = Plan(100_000, self.config.optim.global_batch_size, 0)
        self.method = build_method(self.config, world)
        self._views = [x.to(memory_format=torch.channels_last) for x in random_views(world, local_batch, image_size)]

    def step(self) -> Tensor:
        """One optimiser step; returns the loss."""
        order = torch.from_numpy(self.plan.key_permutation(self.method.step)).to(self.world.device)
        query, key = self._views
        return self.method.train_step(Views(query, key, order), LR, monitored=False).loss


class Lightly:
    """The step of lightly's MoCo v2."""

    def __init__(
        self,
        world: World,
        arch: str,
        local_batch: int,
        image_size: int,
        queue_size: int,
        memory_format: torch.memory_format,
    ) -> None:
        import copy

        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead

        self.world, self.dtype = world, compute_dtype("auto", world.device)
        backbone = build_resnet(arch)
        width = backbone.fc.in_features
        backbone.fc = nn.Identity()  # type: ignore[assignment]
        query = nn.Sequential(backbone, MoCoProjectionHead(width, 2048, DIM)).to(world.device)
        query = query.to(memory_format=memory_format)
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.query = query
        device_ids = [torch.device(world.device)] if world.device != "cpu" else None
        self.ddp: nn.Module = DistributedDataParallel(query, device_ids) if world.world_size > 1 else query
        self.optimizer = torch.optim.SGD(query.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
        self.loss = NTXentLoss(TEMPERATURE, (queue_size, DIM), gather_distributed=True).to(world.device)
        self._views = [x.to(memory_format=memory_format) for x in random_views(world, local_batch, image_size)]

    def step(self) -> Tensor:
        """One optimiser step; returns the loss."""
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

        view_q, view_k = self._views
        distributed = self.world.world_size > 1
        update_momentum(self.query, self.key, MOMENTUM)
        with autocast(self.dtype, self.world.device):
            with torch.no_grad():
                shuffled, shuffle = batch_shuffle(view_k, distributed)
                keys = batch_unshuffle(self.key(shuffled), shuffle, distributed)
            loss = self.loss(self.ddp(view_q), keys)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def random_views(world: World, local_batch: int, image_size: int) -> list[Tensor]:
    """Query and key views of this rank: float32 (N, 3, S, S), as augmentation leaves them."""
    generator = torch.Generator().manual_seed(world.rank)
    shape = (local_batch, 3, image_size, image_size)
    return [torch.randn(shape, generator=generator).to(world.device) for _ in range(2)]


def seconds_of_rank(world: World, program: str, **sizes: Any) -> list[float]:
    """Seconds of some steps of a program, each from a barrier to the next, after one that is not counted."""
    if program == "moco_dist":
        running: Ours | Lightly = Ours(world, **sizes)
    else:
        layout = torch.channels_last if program.endswith("channels-last") else torch.contiguous_format
        running = Lightly(world, memory_format=layout, **sizes)
    seconds = []
    for _ in range(1 + (3 if world.device == "cpu" else 20)):
        barrier(world)
        started = time.perf_counter()
        loss = running.step()
        synchronise(world.device)
        barrier(world)
        seconds.append(time.perf_counter() - started)
        assert loss.isfinite()
    return seconds[1:]


def measure(
    ranks: int, links: dict[str, float | None], batches: list[int], rounds: int, device: str, **sizes: Any
) -> list[dict[str, Any]]:
    """A row for each batch of a rank, and each link: name, and its Gb/s (None: within this machine)."""
    rows = []
    for batch, (link, rate) in itertools.product(batches, links.items()):
        seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
        with nullcontext() if rate is None else hosts(ranks) as made:
            if made:
                made.shape(rate)
            for name in rounds * PROGRAMS:
                case = {"device": device, "program": name, "local_batch": batch, **sizes}
                seconds[name] += run_ranks(seconds_of_rank, ranks, made, **case)[0]
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        row = {"link": link, "gigabit_per_second": rate, "local_batch": batch, "step_seconds": medians,
               "ratio_to_moco_dist": {name: medians[name] / medians["moco_dist"] for name in PROGRAMS[1:]}}  # fmt: skip
        rows.append(row)
        parts = [f"{name} {value:.3f} s" for name, value in medians.items()]
        parts += [f"{name} / moco_dist {value:.2f}" for name, value in row["ratio_to_moco_dist"].items()]
        print(f"{link}, {batch} images a rank: {', '.join(parts)}", flush=True)
    return rows


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet50")
    parser.add_argument("--local-batches", type=int, nargs="+", default=[32])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--queue-size", type=int, default=65536)
    args = results.parse(parser, rounds=1, arch="resnet10", local_batches=[8], image_size=64, queue_size=4096)
    try:
        import lightly
    except ImportError:
        raise SystemExit("lightly is not installed: pip install 'moco_dist[benchmarks]'") from None
    sizes = {"arch": args.arch, "image_size": args.image_size, "queue_size": args.queue_size}
    links: dict[str, float | None] = {"loopback": None, "1 Gb/s": 1.0}
    if args.ranks == 1:
        links = {"no network": None}
    elif reason := why_not():
        print(f"loopback only: {reason}")
        del links["1 Gb/s"]
    device = "cuda" if torch.cuda.device_count() >= args.ranks else "cpu"
    rows = measure(args.ranks, links, args.local_batches, args.rounds, device, **sizes)
    precision = str(compute_dtype("auto", device)).removeprefix("torch.")
    facts = {"ranks": args.ranks, "precision": precision, "lightly": lightly.__version__}
    results.write("peer_step", rows, device, **facts, **sizes)


if __name__ == "__main__":
    main()
