"""SimCLR through the program's own step: the same on any number of ranks, and it goes on from a checkpoint."""

import functools

import pytest
import torch
import torch.nn.functional as F

from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import gather_uneven
from moco_dist.engine.schedule import peak_learning_rate
from moco_dist.method.encoder import build_encoder
from moco_dist.run import checkpoint
from moco_dist.run.saver import Saver
from moco_dist.train import build, train_step
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, small_config
from tests.world import run

STEPS = 3


def config():
    values = small_config().model_dump()
    return type(small_config()).model_validate({**values, "method": "simclr", "simclr": {"temperature": 0.3}})


def train(world, run_dir, start, stop):
    """Steps start .. stop-1, from the checkpoint when start > 0; losses and weights, and a checkpoint."""
    state, engine = build(config(), world)
    if start:
        checkpoint.load(state, checkpoint.latest(run_dir), world)
    plan, table = Plan(NUM_SAMPLES, 64, config().run.seed), images()
    losses = []
    for step in range(start, stop):
        view_q = table[torch.from_numpy(plan.query_indices(step, world)), 0]
        view_k = table[torch.from_numpy(plan.key_indices(step, world)), 1]
        order = torch.from_numpy(plan.key_permutation(step))
        lr = peak_learning_rate(config().optim)
        result = train_step(state, engine, config(), view_q, view_k, order, lr, True, world)
        losses.append(gather_uneven(result.loss[None], world).mean().item())
        assert {"contrastive_top1", "contrastive_top5", "embedding_std"} == result.scalars.keys()
    saver = Saver(run_dir, 1, 0, world, print)
    saver.save(state, {"config": {}})
    saver.finish()
    return losses, {name: p.detach().clone() for name, p in state.query_encoder.named_parameters()}


@functools.cache
def plain():
    """The same in plain PyTorch on one process: both views of a batch through one encoder, BN groups one by one."""
    encoder = build_encoder(config().model, config().run.seed).double().train()
    sgd = torch.optim.SGD(encoder.parameters(), lr=peak_learning_rate(config().optim), momentum=0.9, weight_decay=1e-4)
    plan, table = Plan(NUM_SAMPLES, 64, config().run.seed), images()
    losses = []
    for step in range(STEPS):
        batch, order = table[torch.from_numpy(plan.global_indices(step))], plan.key_permutation(step)
        first = torch.cat([encoder(group) for group in batch[:, 0].split(8)])
        shuffled = torch.cat([encoder(group) for group in batch[order, 1].split(8)])
        second = shuffled[[list(order).index(i) for i in range(64)]]
        z = torch.cat([first, second])
        similarity = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(similarity, torch.arange(128).roll(64))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in encoder.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_the_plain_step(world_size, tmp_path):
    expected = plain()
    for found in run(train, world_size, tmp_path, 0, STEPS):
        assert largest_difference(found[0], expected[0]) < 1e-10
        assert largest_difference(found[1], expected[1]) < 1e-10


def test_goes_on_from_its_checkpoint_on_another_number_of_ranks(tmp_path):
    losses = run(train, 2, tmp_path, 0, 2)[0][0] + run(train, 4, tmp_path, 2, STEPS)[0][0]
    assert largest_difference(losses, plain()[0]) < 1e-10
