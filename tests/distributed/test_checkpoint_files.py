"""How a checkpoint's tensors lie in files: each rank writes its share, and reads what it needs."""

import json
import pickle
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.checkpoint_planning import plans_of_all
from moco_dist.distributed.collectives import as_sharded, barrier, gather_uneven
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.method.batch_norm import running_statistics
from moco_dist.method.build import build_method
from moco_dist.run import checkpoint, tensors
from moco_dist.run.manifest import MANIFEST
from moco_dist.run.tensors import Planner, shares
from tests.distributed.program import largest_difference, small_config
from tests.world import run


def write_as_before(world, run_dir):
    """A checkpoint as version 0.1.0 first wrote them: the library divides the tensors, and there is no mean."""
    method = state_of_its_own(world)
    taken = checkpoint.snapshot(method, {}, world)
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.replicated_tensors(method).items()}
    tensors |= {name: tensor for name, tensor in taken.tensors.items() if isinstance(tensor, DTensor)}
    folder = run_dir / "checkpoints" / "step_00000007"
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if world.is_main:
        (folder / MANIFEST).write_text(json.dumps({**taken.manifest, "files": {}}))
    barrier(world)


def write_now(world, run_dir):
    checkpoint.write(checkpoint.snapshot(state_of_its_own(world), {}, world), run_dir, world)


def state_of_its_own(world):
    """A method no two tensors of which are alike, with running statistics of each rank."""
    method = build_method(small_config(), world)
    for i, tensor in enumerate(checkpoint.replicated_tensors(method).values()):
        if tensor.is_floating_point():
            tensor.add_(torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape) + i)
    for encoder in method.encoders.values():
        for i, buffer in enumerate(running_statistics(encoder).values()):
            buffer.fill_(i + 0.1 * (world.rank + 1))
    method.step = 7
    return method


def contents(world, run_dir):
    """All that a rank has after loading, and the files that it has opened."""
    opened, real = set(), safetensors.safe_open

    def counted(filename, *args, **kwargs):
        opened.add(Path(filename).name)
        return real(filename, *args, **kwargs)

    safetensors.safe_open = counted
    method = build_method(small_config(), world)
    checkpoint.load(method, checkpoint.latest(run_dir), world)
    found = {name: tensor.clone() for name, tensor in checkpoint.replicated_tensors(method).items()}
    for name, encoder in method.encoders.items():
        found |= {f"{name}.{k}": v.clone() for k, v in running_statistics(encoder).items()}
    return found, gather_uneven(method.queue.keys, world), len(opened)


def test_a_checkpoint_of_before_loads_bit_by_bit(tmp_path):
    run(write_as_before, 4, tmp_path / "before")
    run(write_now, 4, tmp_path / "now")
    assert any(name.endswith("mean_statistics") for name in tensors_in(tmp_path / "now"))
    assert not any(name.endswith("mean_statistics") for name in tensors_in(tmp_path / "before"))
    for world_size in (4, 2):
        before, now = (run(contents, world_size, tmp_path / which) for which in ("before", "now"))
        for (its, its_queue, _), (ours, our_queue, _) in zip(before, now, strict=True):
            assert largest_difference(its, ours) <= (1e-14 if world_size == 2 else 0)  # a mean in another order
            assert torch.equal(its_queue, our_queue)
        expected = 0.25 if world_size == 2 else 0.1 * world_size  # the mean of four, or the last rank's own
        assert now[-1][0]["query_encoder.backbone.bn1.running_mean"].unique().tolist() == pytest.approx([expected])


def tensors_in(run_dir):
    names = []
    for file in checkpoint.latest(run_dir).glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as content:
            names += content.keys()
    return names


def test_each_tensor_lies_in_one_file_and_a_rank_opens_few(tmp_path):
    """Rank 0 alone looks into every file for what it holds."""
    run(write_now, 4, tmp_path)
    files = sorted(checkpoint.latest(tmp_path).glob("*.safetensors"))
    assert len(files) == 4
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 0.5 * sum(sizes)
    names = tensors_in(tmp_path)
    assert sorted(name for name in names if names.count(name) > 1) == sorted(
        4 * ["query_encoder.running_statistics", "key_encoder.running_statistics", "queue"]
    )
    assert [count for *_, count in run(contents, 4, tmp_path)] == [4, 1, 1, 1]


def test_shares_are_of_about_the_same_bytes_and_cover_all():
    tensors = {f"{i}": torch.empty(1 + i % 50) for i in range(300)}
    for num_ranks in (1, 7, 64, 512):
        owners = shares(tensors, num_ranks)
        assert owners.keys() == tensors.keys()
        bytes_of = [0] * num_ranks
        for name, rank in owners.items():
            bytes_of[rank] += tensors[name].nbytes
        assert max(bytes_of) - min(bytes_of) <= 200
        assert owners == shares(dict(reversed(tensors.items())), num_ranks)


def planned_together(num_ranks, missing=None):
    """How many functions rank 0 calls to put the plans of so many ranks together; one may have planned nothing."""
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        row = as_sharded(torch.zeros(1, 10_000), num_ranks, World(0, 0, num_ranks, num_ranks))
        plans = [pickle.loads(plan) for plan in plans_of_all({"rows": row}, {}, num_ranks)]
        if missing is not None:
            plans[missing] = replace(plans[missing], items=[])
        planner, calls = Planner(), Counter()
        planner.set_up_planner({"rows": row}, is_coordinator=True)
        sys.setprofile(lambda frame, event, arg: calls.update([event]))
        try:
            planner.create_global_plan(plans)
        finally:
            sys.setprofile(None)
        return calls["call"]
    finally:
        dist.destroy_process_group()


def test_putting_plans_together_grows_with_the_ranks_and_not_with_their_square():
    """While rank 0 plans, it launches no kernels."""
    assert planned_together(128) < 2.2 * planned_together(64)


def test_rows_that_no_rank_has_planned_are_no_checkpoint():
    with pytest.raises(ValueError, match=r"the ranks do not hold all rows of rows \(8, 10000\)"):
        planned_together(8, missing=3)


def load_where_one_rank_finds_no_tensor(world, run_dir):
    method = build_method(small_config(), world)
    real = tensors.dcp.load

    def fail(*args, **kwargs):
        if world.rank == 1:
            raise KeyError("lost")
        return real(*args, **kwargs)

    tensors.dcp.load = fail
    with pytest.raises(UserError, match="does not fit this config or is damaged: 'lost'"):
        checkpoint.load(method, checkpoint.latest(run_dir), world)


def test_what_one_rank_cannot_read_is_an_error_of_all(tmp_path):
    run(write_now, 2, tmp_path)
    run(load_where_one_rank_finds_no_tensor, 2, tmp_path)
