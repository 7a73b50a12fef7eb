"""SimCLR through the program's own step: the same on any number of ranks, and it goes on from a checkpoint."""

import functools

import pytest
import torch
import torch.nn.functional as F

from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import gather_uneven
from moco_dist.engine.schedule import peak_learning_rate
from moco_dist.method.build import build_method
from moco_dist.run import checkpoint
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, saver_for, small_config, views_at
from tests.reference import encode, plain_encoder
from tests.world import run

STEPS = 3


def config():
    values = small_config().model_dump()
    return type(small_config()).model_validate({**values, "method": "simclr", "simclr": {"temperature": 0.3}})


def train(world, run_dir, start, stop):
    """Steps start .. stop-1, from the checkpoint when start > 0; losses and weights, and a checkpoint."""
    method = build_method(config(), world)
    if start:
        checkpoint.load(method, checkpoint.latest(run_dir), world)
    plan, table = Plan(NUM_SAMPLES, 64, config().run.seed), images()
    losses = []
    for step in range(start, stop):
        views = views_at(table, plan, step, world)
        lr = peak_learning_rate(config().optim)
        result = method.train_step(views, lr, True)
        losses.append(gather_uneven(result.loss[None], world).mean().item())
        assert {"contrastive_top1", "contrastive_top5", "embedding_std", "gradient_norm"} == result.scalars.keys()
    saver = saver_for(run_dir, world, print, keep_last=1, keep_every_steps=0)
    saver.save(method, [])
    saver.finish()
    return losses, {name: p.detach().clone() for name, p in method.query_encoder.named_parameters()}


def initial_weights(world):
    """What the program starts from."""
    return {name: p.detach() for name, p in build_method(config(), world).query_encoder.named_parameters()}


@functools.cache
def plain():
    """The same in plain PyTorch on one process: both views of a batch through one encoder, BN groups one by one."""
    encoder = plain_encoder(24, 16, run(initial_weights, 1)[0])
    sgd = torch.optim.SGD(encoder.parameters(), lr=peak_learning_rate(config().optim), momentum=0.9, weight_decay=1e-4)
    plan, table = Plan(NUM_SAMPLES, 64, config().run.seed), images()
    losses = []
    for step in range(STEPS):
        batch, order = table[torch.from_numpy(plan.global_indices(step))], plan.key_permutation(step)
        first = encode(encoder, batch[:, 0], 8)
        shuffled = encode(encoder, batch[order, 1], 8)
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
