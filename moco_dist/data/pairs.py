"""Pairs of views of a step, for people to look at."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.colours import apply_colours
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_training_images
from moco_dist.distributed.world import World


def view_pairs(config: PretrainConfig, count: int, index_folder: Path | None = None, step: int = 0) -> Tensor:
    """The first `count` pairs of views of a step, as the encoders see them, de-normalised.

    `index_folder` is a run's: without it, the headers of shards at an address are all read once more.

    Returns:
        uint8 (count, 2, 3, S, S): query view and key view of the same sample.
    """
    folder = find_training_images(config.data, index_folder)
    plan = Plan(len(folder.paths), min(count, len(folder.paths)), config.run.seed)
    alone = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    with contextlib.closing(pretrain_batches(folder, alone, plan, World(), step, step + 1)) as batches:
        batch = next(batches)
    home = torch.from_numpy(np.argsort(plan.key_permutation(step)))
    mean = torch.tensor(config.augment.mean)[:, None, None]
    std = torch.tensor(config.augment.std)[:, None, None]
    views = [
        apply_colours(view, colours, config.augment) * std + mean
        for view, colours in ((batch.view_q, batch.colours_q), (batch.view_k[home], batch.colours_k[home]))
    ]
    return (torch.stack(views, dim=1) * 255).round().clamp(0, 255).to(torch.uint8)
