"""DeepSpeed, float32 and compile compute what the plain engine in float64, and one process, compute."""

import pytest
import torch

from moco_dist import checkpoint
from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import gather_uneven, process_group
from moco_dist.saver import Saver
from moco_dist.train import build, train_step
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, run_program, small_config
from tests.world import run

STEPS = 20
# Float32 rounding, after 20 steps that each amplify it a little.
TOLERANCE = {"losses": 2e-4, "query_encoder": 2e-4, "key_encoder": 2e-4, "queue": 5e-3}


def deepspeed_program(world, config, steps):
    pytest.importorskip("deepspeed")
    with process_group(world, alone_too=True):
        return run_program(world, config, steps)


def close(ours, expected):
    for name, tolerance in TOLERANCE.items():
        assert largest_difference(ours[name], expected[name]) < tolerance, name
    assert torch.equal(ours["queue_ptr"], expected["queue_ptr"])


def config_of(optimizer="sgd", **engine):
    optim = {"precision": "fp32", "optimizer": optimizer, "base_lr": 0.1 if optimizer == "sgd" else 4.0}
    return small_config(optim=optim, engine=engine, moco={"queue_size": 512})


@pytest.fixture(scope="module")
def alone():
    """One process, by optimiser."""
    return {name: run(run_program, 1, config_of(name), STEPS)[0] for name in ("sgd", "lars")}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "accum"), [(2, 1), (4, 1), (8, 1), (1, 4), (2, 2)])
def test_float32_is_the_same_on_any_number_of_ranks(alone, world_size, accum):
    config = config_of()
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"grad_accum_steps": accum})})
    for ours in run(run_program, world_size, config, STEPS):
        close(ours, alone["sgd"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeed_is_the_same_training(alone, optimizer, zero_stage, world_size):
    config = config_of(optimizer, kind="deepspeed", zero_stage=zero_stage)
    for ours in run(deepspeed_program, world_size, config, STEPS):
        close(ours, alone[optimizer])


def train(world, run_dir, config, start, stop):
    """Steps start .. stop-1 from the newest checkpoint when start > 0, and a checkpoint at the end."""
    with process_group(world, alone_too=True):
        state, engine = build(config, world)
        if start:
            checkpoint.load(state, checkpoint.latest(run_dir), world)
        plan, table = Plan(NUM_SAMPLES, config.optim.global_batch_size, config.run.seed), images(torch.float32)
        losses = []
        for step in range(start, stop):
            view_q = table[torch.from_numpy(plan.query_indices(step, world)), 0]
            view_k = table[torch.from_numpy(plan.key_indices(step, world)), 1]
            order = torch.from_numpy(plan.key_permutation(step))
            result = train_step(state, engine, config, view_q, view_k, order, 0.02, False, world)
            losses.append(gather_uneven(result.loss[None], world).mean().item())
        saver = Saver(run_dir, 2, 0, world, print)
        saver.save(state, {"config": {}})
        saver.finish()
        return losses


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_either_engine_goes_on_where_the_other_stopped(tmp_path, optimizer):
    """DDP on 2 ranks, ZeRO 2 on 4, ZeRO 1 on 2, ZeRO 0 on 1, DDP again."""
    pytest.importorskip("deepspeed")
    expected = run(train, 1, tmp_path / "whole", config_of(optimizer), 0, 10)[0]
    losses = []
    plan = [(2, {}), (4, {"zero_stage": 2}), (2, {"zero_stage": 1}), (1, {"zero_stage": 0}), (2, {})]
    for i, (world_size, zero) in enumerate(plan):
        engine = {"kind": "deepspeed", **zero} if zero else {}
        losses += run(train, world_size, tmp_path / "moving", config_of(optimizer, **engine), 2 * i, 2 * i + 2)[0]
    assert largest_difference(losses, expected) < TOLERANCE["losses"]
