"""What the loop, checkpoints and evaluations know of a method: the protocol, and what a step leaves behind."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moco_dist.data.views import Views
from moco_dist.engine import Engine
from moco_dist.method.queue import Queue


class StepResult(NamedTuple):
    """What a step leaves for the log.

    Attributes:
        loss: () this rank's mean.
        scalars: of a monitored step, () each, by names of the method's own choice: each is a column of log.jsonl and
            a metric of the tracker. A report or comparison shows only those that it names. A number that no method owns
            is added to them where `train.py` writes the row.
    """

    loss: Tensor
    scalars: dict[str, Tensor]


class Method(Protocol):
    """A way of pre-training, with all that it keeps from step to step; everything else is recomputed from the config.

    What follows from the config alone (chance loss, negatives, a line that describes the run) is in the method's
    section of the config.

    Attributes:
        query_encoder: the encoder that is trained, evaluated and exported.
        encoders: all encoders, by their names in a checkpoint.
        queue: of keys; None where there is none.
        engine: takes the gradients and the optimiser's step of the query encoder.
        dtype: what the encoders compute in, and so what views are made in.
        step: optimiser steps done. Each method's `train_step` adds 1, and `run/checkpoint.py` sets it when it loads: so
            with whatever else a method may count.
    """

    encoders: dict[str, nn.Module]
    engine: Engine
    dtype: torch.dtype
    step: int

    @property
    def query_encoder(self) -> nn.Module: ...

    @property
    def queue(self) -> Queue | None: ...

    def fill_queue(self, batches: Iterable[Views]) -> None:
        """Before the first step: the keys of `batches`, oldest first, take the place of the random ones.

        Nothing else changes, and done again it comes to the same. Not called where the config asks for no batch.
        """
        ...

    def train_step(self, views: Views, lr: float, monitored: bool) -> StepResult:
        """One optimiser step, the same at any world size.

        Args:
            views: this rank's share of the batch.
            lr: learning rate.
            monitored: whether to look at the embeddings: a step of the log.
        """
        ...


def spread(embeddings: Tensor) -> Tensor:
    """Standard deviation of (N, C) unit vectors times sqrt(C): 1 when they fill the sphere, 0 when they collapsed."""
    return embeddings.std(dim=0).mean() * embeddings.shape[1] ** 0.5
