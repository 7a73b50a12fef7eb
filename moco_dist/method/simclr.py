"""A step of SimCLR (arXiv 2002.05709, Algorithm 1), for comparison: end to end, the batch its own dictionary.

The second views come shuffled over the BN groups, as MoCo's keys do, so that an encoder cannot tell a pair by the
statistics that it shares (SimCLR itself normalises over all devices, sec. 2.2, and names the shuffle as the other way).
"""

import torch
from torch import Tensor

from moco_dist.distributed.collectives import all_gather
from moco_dist.distributed.world import World
from moco_dist.engine import Engine
from moco_dist.method.ntxent import nt_xent


def simclr_step(
    engine: Engine, view_q: Tensor, view_k: Tensor, key_order: Tensor, temperature: float, lr: float, world: World
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimiser step.

    Args:
        engine: forward, backward and step of the encoder.
        view_q: (N, 3, S, S) first views of this rank's samples.
        view_k: (N, 3, S, S) second views of the samples that the shuffle gave it.
        key_order: int64 (B,), `Plan.key_permutation`.
        temperature: tau.
        lr: learning rate.
        world: this process.

    Returns:
        this rank's mean loss (), and its embeddings (N, C) of both views, without gradient.
    """
    z_q, z_k = engine(torch.cat([view_q, view_k])).chunk(2)
    loss = nt_xent(z_q, z_k, key_order, temperature, world)
    engine.backward(loss)
    engine.step(lr)
    return loss.detach(), z_q.detach(), z_k.detach()


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
