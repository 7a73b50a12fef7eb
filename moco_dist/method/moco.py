"""Momentum Contrast: Algorithm 1 of v1 (arXiv 1911.05722), line by line; v2 differs in settings alone."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.views import Views
from moco_dist.distributed.collectives import all_gather
from moco_dist.distributed.world import World
from moco_dist.engine.build import build_engine, weights_dtype
from moco_dist.engine.precision import autocast, compute_dtype
from moco_dist.engine.speed import compile_options
from moco_dist.method.batch_norm import running_statistics, set_micro_batch
from moco_dist.method.encoder import build_encoder
from moco_dist.method.infonce import contrastive_accuracy, gather_and_unshuffle, info_nce
from moco_dist.method.queue import Queue
from moco_dist.method.step import StepResult, spread


class MoCo:
    """MoCo v1 and v2; with `moco.symmetric`, each view is query and key in turn. See `Method`."""

    def __init__(self, config: PretrainConfig, world: World) -> None:
        """At step 0: two encoders of equal weights, and a queue of random keys."""
        self._config, self._world = config, world
        self.dtype = compute_dtype(config.optim.precision, world.device)
        self.query_encoder = build_encoder(config.model, config.run.seed, config.data.image_size).to(
            world.device, weights_dtype(self.dtype)
        )
        # Its BatchNorms keep statistics of their own, and are always in training mode.
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False).train()
        self.encoders: dict[str, nn.Module] = {"query_encoder": self.query_encoder, "key_encoder": self.key_encoder}
        self.engine = build_engine(self.query_encoder, config, world)
        if config.engine.zero_stage:
            # Its weights lie as ZeRO laid out the query encoder's, so that the momentum update is one pass over both.
            self.key_encoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if config.engine.compile != "off":
            self.key_encoder.compile(**compile_options(config.engine))
        self.queue = Queue(
            config.moco.queue_size, config.model.embedding_dim, config.run.seed, world, weights_dtype(self.dtype)
        )
        self.step = 0

    @torch.no_grad()
    def fill_queue(self, batches: Iterable[Views]) -> None:
        """See `Method`. The key encoder's running statistics stay those of steps."""
        statistics = running_statistics(self.key_encoder)
        before = {name: buffer.clone() for name, buffer in statistics.items()}
        self.queue.ptr.zero_()
        try:
            for views in batches:
                if self._config.engine.cuda_graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                key_views = [views.key, views.query] if self._config.moco.symmetric else [views.key]
                keys = torch.cat([self._encode_keys(view) for view in key_views])
                _, k_all = gather_and_unshuffle(keys[:0], keys, views.key_order, self._world)
                self.queue.enqueue(k_all.flatten(0, 1))
        finally:
            for name, buffer in statistics.items():
                buffer.copy_(before[name])

    def train_step(self, views: Views, lr: float, monitored: bool) -> StepResult:
        """See `Method`. The same losses and weights at any world size and number of micro-batches.

        The symmetric loss is a second direction of the same step (as in arXiv 2104.02057, Algorithm 1, but with the
        queue). It needs no further image: its queries are the key views that this rank has, of the shuffled batch, and
        its keys the query views, in sample order. So there too no query shares its BN group with its own key.
        """
        accum, moco = self._config.optim.grad_accum_steps, self._config.moco
        if self._config.engine.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs returned may be overwritten
        query_views, key_views = [views.query], [views.key]
        if moco.symmetric:
            query_views, key_views = [views.query, views.key], [views.key, views.query]

        momentum_update(self.query_encoder, self.key_encoder, moco.momentum)  # before the keys are made
        keys = torch.cat([self._encode_keys(view) for view in key_views])
        loss_sum = keys.new_zeros(())
        for i, parts in enumerate(zip(*(view.chunk(accum) for view in query_views), strict=True)):
            set_micro_batch(self.query_encoder, i, accum)
            q = self.engine(parts[0] if len(parts) == 1 else torch.cat(parts), synchronise=i == accum - 1)
            if i == 0:
                q_all, k_all = gather_and_unshuffle(q, keys, views.key_order, self._world)
                positives = self._positives(k_all, views.key_order)
            else:
                q_all = all_gather(q.detach(), self._world)
            loss = info_nce(q, positives[i], q_all, self.queue.keys, moco.temperature, self._world)
            self.engine.backward(loss / accum)
            loss_sum += loss.detach()
        scalars = self.engine.step(lr, monitored)
        if monitored:
            scalars |= self._monitor(q_all, positives[-1])
        self.queue.enqueue(k_all.flatten(0, 1))  # after the loss: a key is never its own negative
        self.step += 1
        return StepResult(loss_sum / accum, scalars)

    @torch.no_grad()
    def _encode_keys(self, view: Tensor) -> Tensor:
        """(B/W, C) keys of this rank's view, all micro-batches of the step, before the first loss."""
        accum = self._config.optim.grad_accum_steps
        keys = []
        for i, images in enumerate(view.chunk(accum)):
            set_micro_batch(self.key_encoder, i, accum)
            with autocast(self.dtype, self._world.device):
                keys.append(self.key_encoder(images))
        return torch.cat(keys)

    def _positives(self, k_all: Tensor, key_order: Tensor) -> list[Tensor]:
        """The keys (n, C) that belong to the queries of each micro-batch of this rank.

        Args:
            k_all: (directions, B, C) in sample order.
            key_order: int64 (B,), as in `Views`.
        """
        accum, local_batch = self._config.optim.grad_accum_steps, k_all.shape[1] // self._world.world_size
        own_rows = slice(self._world.rank * local_batch, (self._world.rank + 1) * local_batch)
        positives = k_all[0, own_rows].chunk(accum)
        if len(k_all) == 1:
            return list(positives)
        back = k_all[1, key_order[own_rows]].chunk(accum)  # of the key views, whose samples are shuffled
        return [torch.cat(pair) for pair in zip(positives, back, strict=True)]

    def _monitor(self, q_all: Tensor, k: Tensor) -> dict[str, Tensor]:
        """The last micro-batch's contrastive accuracy in percent, and its embeddings' spread over the sphere."""
        top1, top5 = contrastive_accuracy(q_all, all_gather(k, self._world), self.queue.keys, self._world)
        return {"contrastive_top1": top1, "contrastive_top5": top5, "embedding_std": spread(q_all)}


@torch.no_grad()
def momentum_update(query_encoder: nn.Module, key_encoder: nn.Module, momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q, on parameters (v1 eq. 2). BatchNorm buffers are the key encoder's own.

    Reads both sets of weights and writes one: 12 bytes a float32 parameter.
    """
    torch._foreach_lerp_(list(key_encoder.parameters()), list(query_encoder.parameters()), 1 - momentum)
