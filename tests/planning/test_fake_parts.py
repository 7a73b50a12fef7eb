"""What no dry run runs, on a GPU that is not there.

LARS on a rank's part of the parameters, as ZeRO leaves it; the step that `plan --calibrate` and benchmarks time.
"""

import pytest
import torch
from torch import nn

from moco_dist.distributed.world import World
from moco_dist.engine.deepspeed import DeepSpeedEngine
from moco_dist.engine.optimizer import LARS, Partition, build_optimizer, make_buffers
from moco_dist.method.encoder import build_encoder
from moco_dist.planning import random_step
from moco_dist.planning.fake_gpu import DEVICE, fake_rank
from moco_dist.planning.watch import HostWaitError, Watch
from tests.planning.config import config_of

WORLDS = {1: (0,), 8: (5,), 1024: (0, 1023)}  # ranks, and those that are tried


class EngineOfZero(DeepSpeedEngine):
    """What DeepSpeed leaves the engine of a rank, without DeepSpeed: a flat parameter that is 1/W of all."""

    def __init__(self, world):
        config = config_of(optim={"global_batch_size": 64, "optimizer": "lars"})
        self.module, self._world, self._zero = build_encoder(config.model, 0).to(DEVICE), world, object()
        lars = build_optimizer(self.module, config.optim)
        assert isinstance(lars, LARS)
        self.optimizer = lars
        numbers = sum(p.numel() for p in self.module.parameters())
        self.part = nn.Parameter(torch.empty(-(-numbers // (2 * world.world_size)) * 2, device=DEVICE))
        (group,) = lars.param_groups
        group["params"] = [self.part]
        make_buffers(lars)
        lars.partition = self.partition = self._partition()
        self.optimizer.register_step_pre_hook(self._leave_out_if_not_finite)

    def _places(self, number):
        """One after the other: tensors that are not there have no addresses."""
        places, place = {}, 0
        for name, parameter in self.module.named_parameters():
            places[name] = place
            place += parameter.numel()
        return places

    def update(self):
        self.part.grad = torch.empty_like(self.part)
        self.optimizer.step()


def parts():
    for world_size, ranks in WORLDS.items():
        for rank in ranks:
            yield World(rank, rank % min(world_size, 8), world_size, min(world_size, 8), str(DEVICE))


@pytest.mark.parametrize("world", list(parts()), ids=lambda world: f"{world.rank} of {world.world_size}")
def test_lars_of_a_part_of_zero_waits_for_nothing(world):
    """After its first step, which makes what is made once; two small all-reduces a step, and no other."""
    with fake_rank(world), Watch() as watch:
        engine = EngineOfZero(world)
        assert sum(last - first for _, first, last in engine.partition.pieces) <= len(engine.part)
        engine.update()
        with watch.counting(may_wait=False) as count:
            engine.update()
        sums = 4 * (2 * len(engine.partition.is_adapted) + 1)  # of squares, and whether all is finite
        others = world.world_size - 1
        assert sum(count.received_bytes.values()) == pytest.approx(2 * others * sums / world.world_size, abs=2)


@pytest.mark.parametrize(("mistake", "told"), [
    (lambda partition, norms: norms[:, torch.arange(norms.shape[1])], "an index that stayed on the CPU"),
    (lambda partition, norms: norms * float(norms.sum()), "reads a value"),
    (lambda partition, norms: norms[norms > 0].view(2, -1), "an index by a mask"),
])  # fmt: skip
def test_a_mistake_in_it_is_found(monkeypatch, mistake, told):
    world = World(3, 3, 8, 8, str(DEVICE))
    monkeypatch.setattr(Partition, "norms_of_whole", mistake)
    with fake_rank(world), Watch() as watch:
        engine = EngineOfZero(world)
        with watch.counting(may_wait=False), pytest.raises(HostWaitError, match=told):
            engine.update()


@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_a_timed_step_waits_for_nothing_but_the_clock(method, monkeypatch):
    """A whole one, and one by parts, for each of which the clock waits."""
    waits = []
    monkeypatch.setattr(random_step, "synchronise", waits.append)
    world = World(device=str(DEVICE))
    with fake_rank(world), Watch() as watch:
        step = random_step.RandomStep(config_of(method=method), 16, world.device)
        step.step()  # makes what is made once
        with watch.counting(may_wait=False) as count:
            step.seconds_of_one()
            parts = step.seconds_of_parts(step.marks(), "rest")
    assert list(parts) == ["colours", "query forward", "backward", "optimiser", "rest"]
    assert set(waits) == {world.device}
    assert count.flops > 0
