"""Bytes that a plan counts, beside what the program really keeps, sends and saves."""

import shutil

import pytest
import torch

from moco_dist.config.architectures import ARCHITECTURES
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.doctor.machine import disk
from moco_dist.method.build import build_method
from moco_dist.method.encoder import Encoder
from moco_dist.planning.arithmetic import saved_bytes, sizes
from moco_dist.run import checkpoint, size
from moco_dist.run.size import checkpoint_bytes
from tests.distributed.program import SIDE
from tests.distributed.traffic import collectives_of_a_step
from tests.planning.config import config_of
from tests.world import run


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("fp32", torch.float32, 0), ("bf16", torch.bfloat16, 0.01)],
)
def test_activations_are_those_of_a_real_forward_pass(precision, dtype, tolerance):
    config = config_of(optim={"global_batch_size": 64, "precision": precision})
    images = torch.zeros(32, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    real = saved_bytes(Encoder(config.model).to(memory_format=torch.channels_last), images, dtype)
    counted = sizes(config, 2, 2).activation_bytes
    assert abs(counted - real) <= tolerance * real
    halved = config_of(optim={"global_batch_size": 64, "precision": precision, "grad_accum_steps": 2})
    copies = 2 * sizes(config, 2, 2).parameters if precision == "bf16" else 0  # the weights in 16 bits, at any batch
    assert 0.45 < (sizes(halved, 2, 2).activation_bytes - copies) / (counted - copies) < 0.55


def test_a_step_with_both_views_as_queries_keeps_twice_as_much():
    one, symmetric, simclr = (
        sizes(config_of(**sections), 2, 2).activation_bytes
        for sections in ({}, {"moco": {"queue_size": 512, "symmetric": True}}, {"method": "simclr"})
    )
    assert 2 * one == symmetric == simclr


def test_memory_and_checkpoint_are_those_of_the_state():
    config = config_of()
    method = build_method(config, World())
    planned, floats = sizes(config, 1, 1), sum(p.nbytes for p in method.query_encoder.parameters())
    memory = planned.memory()
    assert planned.parameters == sum(p.numel() for p in method.query_encoder.parameters())
    assert memory["query encoder's weights"] == memory["gradients"] == floats
    assert memory["optimiser's momentum"] == sum(t.nbytes for t in method.engine.optimizer_tensors().values())
    assert memory["queue shard"] == method.queue.keys.nbytes
    assert sizes(config, 8, 8).memory()["queue shard"] == method.queue.keys.nbytes // 8


@pytest.mark.parametrize("name", ["moco", "simclr"])
def test_bytes_of_a_checkpoint_are_those_on_disk(name, tmp_path, monkeypatch):
    """`plan` and `doctor` count them without a forward pass; a file has names and a few counters beside them."""
    config = config_of(method=name, run={"dir": tmp_path, "device": "cpu"}, checkpoint={"keep_last": 1})
    method = build_method(config, World())
    folder = checkpoint.write(checkpoint.snapshot(method, {}, World()), tmp_path, World())
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    counted = checkpoint_bytes(config, 1)
    assert 0 <= on_disk - counted < 64 * 1024
    usage = shutil.disk_usage(tmp_path)
    for free, level in [(2 * counted, "ok"), (2 * counted - 1, "error")]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert disk(config, 1).level == level


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_resnet_is_counted_as_it_is_built(arch, stem):
    """Without torch, so that `doctor` is quick; one with other arguments than these has to be built."""
    config = config_of(model={"arch": arch, "stem": stem, "head_hidden_dims": [96, 48], "embedding_dim": 16})
    assert size._of_resnet(config.model) == size._of_built(config)


def _collectives(world, configs):
    return [collectives_of_a_step(world, config)[0] for config in configs]


@pytest.mark.slow
def test_a_step_receives_what_is_counted():
    """Of a real step over gloo, of each method: gradients, features and images, by what its collectives move."""
    world_size, data, symmetric = 2, {"root": "d", "image_size": SIDE}, {"moco": {"queue_size": 512, "symmetric": True}}
    ways = [({}, "loader"), (symmetric, "loader"), (symmetric, "all_gather"), ({"method": "simclr"}, "loader")]
    configs = [config_of(data=data, shuffle={"exchange": exchange}, **method) for method, exchange in ways]
    for of_rank in run(_collectives, world_size, configs):
        for seen, config in zip(of_rank, configs, strict=True):
            planned = sizes(config, world_size, world_size).received()
            moved = {kind: sum(size for name, size in seen if name == kind) for kind, _ in seen}
            assert moved.pop("allreduce") == planned["gradients"]  # 2 (W - 1) / W of its bytes
            assert moved.keys() <= {"allgather_base", "alltoall_base"}
            assert sum(moved.values()) // 2 == planned["features"] + planned["images"]
            assert (planned["images"] > 0) == (config.shuffle.exchange == "all_gather")


@pytest.mark.parametrize(("way", "megabytes"), [("loader", 0), ("auto", 1.8), ("all_to_all", 4.2), ("all_gather", 135)])
def test_images_on_the_network_are_those_of_the_paper_on_how_it_works(way, megabytes):
    config = PretrainConfig.model_validate(
        {"run": {"dir": "r"}, "data": {"root": "d"}, "shuffle": {"exchange": way}, "model": {"arch": "resnet18"}}
    )
    planned = sizes(config, 8, 4)
    assert planned.received()["images"] / 1e6 == pytest.approx(megabytes, rel=0.01)
    if way == "all_to_all":  # each of a host's 4 ranks gets 4/7 of what it gets from 7 others from the other host
        assert planned.into_host()["images"] == pytest.approx(planned.received()["images"] * 4 * 4 / 7, abs=4)
    if way == "auto":  # half of the keys come from ranks of the same host, and none crosses
        assert planned.into_host()["images"] == 0
    assert planned.decodes == {"loader": 32 * (2 - 1 / 8), "auto": 32 * 1.5}.get(way, 32)
