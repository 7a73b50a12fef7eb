"""NT-Xent on 1, 2 and 4 ranks: loss and gradients of one process that has the whole batch, written plainly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco_dist.method.ntxent import nt_xent
from tests.world import run

BATCH, DIM, TEMPERATURE = 16, 6, 0.1
ORDER = torch.from_numpy(np.random.default_rng(4).permutation(BATCH))


def features():
    """(2, B, C): two views of every sample, in sample order."""
    generator = torch.Generator().manual_seed(2)
    return F.normalize(torch.randn(2, BATCH, DIM, generator=generator, dtype=torch.float64), dim=2)


def plain():
    """Row by row, as equation 1 stands."""
    z = features().requires_grad_()
    rows = z.flatten(0, 1)
    losses = []
    for i in range(2 * BATCH):
        others = [j for j in range(2 * BATCH) if j != i]
        similarity = rows[i] @ rows.T / TEMPERATURE
        losses.append(similarity[others].logsumexp(0) - similarity[(i + BATCH) % (2 * BATCH)])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), z.grad


def ours(world):
    """This rank's loss, and its share of the gradients, as the engine's mean over ranks has them."""
    n = BATCH // world.world_size
    own = slice(world.rank * n, (world.rank + 1) * n)
    z_q = features()[0, own].clone().requires_grad_()
    z_k = features()[1, ORDER[own]].clone().requires_grad_()
    loss = nt_xent(z_q, z_k, ORDER, TEMPERATURE, world)
    loss.backward()
    return loss.item(), z_q.grad / world.world_size, z_k.grad / world.world_size


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_the_plain_loss_and_its_gradients(world_size):
    results = run(ours, world_size)
    loss, gradient = plain()
    assert np.mean([r[0] for r in results]) == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), gradient[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), gradient[1, ORDER], atol=1e-12, rtol=0)
