"""SimCLR (arXiv 2002.05709, Algorithm 1), for comparison: one encoder, end to end, the batch its own dictionary."""

from collections.abc import Iterable

import torch
from torch import nn

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.views import Views
from moco_dist.distributed.world import World
from moco_dist.engine.build import build_engine, weights_dtype
from moco_dist.engine.precision import compute_dtype
from moco_dist.method.encoder import build_encoder
from moco_dist.method.ntxent import batch_accuracy, nt_xent
from moco_dist.method.step import StepResult, spread


class SimCLR:
    """See `Method`."""

    def __init__(self, config: PretrainConfig, world: World) -> None:
        """At step 0."""
        self._config, self._world = config, world
        self.dtype = compute_dtype(config.optim.precision, world.device)
        self.query_encoder = build_encoder(config.model, config.run.seed, config.data.image_size).to(
            world.device, weights_dtype(self.dtype)
        )
        self.encoders: dict[str, nn.Module] = {"query_encoder": self.query_encoder}
        self.engine = build_engine(self.query_encoder, config, world)
        self.queue = None
        self.step = 0

    def fill_queue(self, batches: Iterable[Views]) -> None:
        """There is none."""

    def train_step(self, views: Views, lr: float, monitored: bool) -> StepResult:
        """See `Method`.

        The second views come shuffled over the BN groups, as MoCo's keys do, so that an encoder cannot tell a pair by
        the statistics that it shares (SimCLR itself normalises over all devices, sec. 2.2, and names the shuffle as
        another way).
        """
        if self._config.engine.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs returned may be overwritten
        z_q, z_k = self.engine(torch.cat([views.query, views.key])).chunk(2)
        loss = nt_xent(z_q, z_k, views.key_order, self._config.simclr.temperature, self._world)
        self.engine.backward(loss)
        scalars = self.engine.step(lr, monitored)
        if monitored:
            top1, top5, first = batch_accuracy(z_q.detach(), z_k.detach(), views.key_order, self._world)
            scalars |= {"contrastive_top1": top1, "contrastive_top5": top5, "embedding_std": spread(first)}
        self.step += 1
        return StepResult(loss.detach(), scalars)
