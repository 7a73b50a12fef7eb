"""NT-Xent, the loss of SimCLR (arXiv 2002.05709, eq. 1): the negatives are the batch itself, gradients go both ways.

Every rank's features are gathered; each rank computes the losses of its own rows against all of them. A feature is a
query on its own rank and a key on every rank, so its gradient is the sum of what all ranks find: exact, as if one
process had the whole batch (a gather without gradient would drop the keys' part).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_dist.distributed.collectives import all_gather, reduce_scatter_sum
from moco_dist.distributed.world import World


def nt_xent(z_q: Tensor, z_k: Tensor, key_order: Tensor, temperature: float, world: World) -> Tensor:
    """The mean over this rank's 2N rows; the mean over ranks makes it the global batch's.

    Args:
        z_q: (N, C) unit vectors of this rank's samples' first views, with gradient.
        z_k: (N, C) of the second views of the samples that the shuffle gave it, with gradient.
        key_order: int64 (B,), `Plan.key_permutation`: position i of the second views is sample key_order[i].
        temperature: tau.
        world: this process.

    Returns:
        (), with gradient. Receives (W - 1) 2NC numbers forward, and as many backward.
    """
    n, total = len(z_q), len(key_order)
    gathered = _Gather.apply(torch.stack([z_q, z_k], dim=1), world)  # (B, 2, C): rows of view_q and, shuffled, view_k
    keys = torch.cat([gathered[:, 0], gathered[:, 1]])  # (2B, C)
    place = torch.arange(total, device=z_q.device)
    place_of_second = torch.empty_like(place).index_copy_(0, key_order, place)  # where a sample's second view is
    own = torch.arange(world.rank * n, (world.rank + 1) * n, device=z_q.device)
    self_rows = torch.cat([own, total + own])
    positives = torch.cat([total + place_of_second[own], key_order[own]])
    logits = torch.cat([z_q, z_k]) @ keys.T / temperature  # (2N, 2B)
    logits = logits.scatter(1, self_rows[:, None], -torch.inf)
    return F.cross_entropy(logits, positives)


@torch.no_grad()
def batch_accuracy(z_q: Tensor, z_k: Tensor, key_order: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Percent of first views whose own second view is the nearest of the batch (top-1) or among five; for log steps.

    Args:
        z_q: (N, C) this rank's first views.
        z_k: (N, C) its second views, of the shuffled batch.
        key_order: int64 (B,).
        world: this process.

    Returns:
        top-1, top-5 and all ranks' first views (B, C). Receives (W - 1) 2NC numbers.
    """
    first, shuffled = all_gather(torch.stack([z_q, z_k], dim=1), world).unbind(1)
    similarity = first @ shuffled.T
    positive = similarity.gather(1, torch.empty_like(key_order).index_copy_(
        0, key_order, torch.arange(len(key_order), device=key_order.device))[:, None])  # fmt: skip
    above = (similarity > positive).sum(1)
    return 100 * (above < 1).float().mean(), 100 * (above < 5).float().mean(), first


class _Gather(torch.autograd.Function):
    """All ranks' rows; the gradient of a row is the sum of what all ranks found for it."""

    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        return all_gather(x, world)

    @staticmethod
    def backward(ctx, gradient):
        return reduce_scatter_sum(gradient, ctx.world), None
