"""What planning a checkpoint costs rank 0's thread, by number of ranks: every rank plans all tensors, or its share.

The second of the three ways has torch's own planner, which compares the rows of each rank with those of every other;
the third is the program's.

    python -m benchmarks.checkpoint_planning [--ranks 64 512 1024 --rounds 3]

A ResNet-50 with its key encoder, momentum and a queue. One process is rank 0 of a fake group of W; the plans of the
other ranks are made of its own. Measured is what `dcp.save` does on rank 0 before anything is written: it plans for
itself, unpickles the plans of W ranks, compares them, and pickles each rank's answer. Seconds are of the processor, in
which the thread holds the interpreter: meanwhile no kernel is launched. The ways take turns.
"""

import argparse
import dataclasses
import pickle
import statistics
import tempfile
import time
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import results
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.method.build import build_method
from moco_dist.run import checkpoint
from moco_dist.run.tensors import Planner, shares

WAYS = ("every rank plans all tensors", "every rank plans its share", "and no rows are compared")


def plans_of_all(tensors: dict[str, Tensor], owners: dict[str, int] | None, num_ranks: int) -> list[bytes]:
    """The pickled plan of each rank: of all tensors, or of those that it owns; and of its rows of the sharded ones."""
    plan = DefaultSavePlanner()
    plan.set_up_planner(tensors, is_coordinator=True)
    whole = plan.create_local_plan()
    plans = []
    for rank in range(num_ranks):
        items = []
        for item in whole.items:
            name = item.index.fqn
            if isinstance(tensors[name], DTensor):
                assert item.tensor_data is not None
                chunk = item.tensor_data.chunk
                offsets = type(chunk.sizes)((rank * chunk.sizes[0], *chunk.offsets[1:]))
                data = dataclasses.replace(item.tensor_data, chunk=dataclasses.replace(chunk, offsets=offsets))
                items.append(
                    dataclasses.replace(item, index=dataclasses.replace(item.index, offset=offsets), tensor_data=data)
                )
            elif owners is None or owners[name] == rank:
                items.append(item)
        mappings = {item.index.fqn: whole.planner_data[item.index.fqn] for item in items}
        plans.append(pickle.dumps(dataclasses.replace(whole, items=items, planner_data=mappings)))
    return plans


def planned(tensors: dict[str, Tensor], plans: list[bytes], planner: DefaultSavePlanner) -> float:
    """Processor seconds of rank 0, which holds `tensors` and has received `plans`."""
    writer = dcp.HuggingFaceStorageWriter(tempfile.gettempdir(), save_distributed=True)
    started = time.thread_time()
    planner.set_up_planner(tensors, is_coordinator=True)
    writer.prepare_local_plan(planner.create_local_plan())
    answers, _ = planner.create_global_plan([pickle.loads(plan) for plan in plans])
    for answer in writer.prepare_global_plan(answers):
        pickle.dumps(answer)
    return time.thread_time() - started


def measured(num_ranks: int, rounds: int) -> dict[str, Any]:
    """Medians of both ways in a world of so many ranks."""
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    world = World(0, 0, num_ranks, 8)
    config = PretrainConfig.model_validate(
        {"run": {"dir": "x"}, "data": {"root": "x"}, "optim": {"global_batch_size": 32 * num_ranks}}
    )
    method = build_method(config, world)
    replicated = {name: tensor.contiguous() for name, tensor in checkpoint.replicated_tensors(method).items()}
    ours = checkpoint.snapshot(method, {}, world).tensors
    sharded = {name: tensor for name, tensor in ours.items() if isinstance(tensor, DTensor)}
    everything = {**replicated, **sharded}
    whole = plans_of_all(everything, None, num_ranks)
    of_shares = plans_of_all(everything, shares(replicated, num_ranks), num_ranks)
    cases = [(everything, whole, DefaultSavePlanner), (ours, of_shares, DefaultSavePlanner), (ours, of_shares, Planner)]
    readings: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for reading, (tensors, plans, planner) in zip(readings, cases, strict=True):
            reading.append(planned(tensors, plans, planner()))
    dist.destroy_process_group()
    medians = [statistics.median(reading) for reading in readings]
    return {
        "ranks": num_ranks, "tensors": len(everything), "ways": dict(zip(WAYS, medians, strict=True)),
        "ratio_of_medians": medians[0] / medians[-1], "gathered_bytes": [sum(map(len, x)) for x in (whole, of_shares)],
    }  # fmt: skip


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    args = results.parse(parser, ranks=[8], rounds=1)
    rows = []
    for num_ranks in args.ranks:
        rows.append(measured(num_ranks, args.rounds))
        print(rows[-1], flush=True)
    results.write("checkpoint_planning", rows, rounds=args.rounds)


if __name__ == "__main__":
    main()
