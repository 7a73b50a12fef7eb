"""Pairs of views for eyes."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.colours import apply_colours
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_training_images
from moco_dist.distributed.world import World
from moco_dist.errors import UserError, file_error


def view_pairs(config: PretrainConfig, count: int, step: int = 0) -> Tensor:
    """The first `count` pairs of views of a step, as the encoders see them, de-normalised.

    Returns:
        uint8 (count, 2, 3, S, S): query view and key view of the same sample.
    """
    folder = find_training_images(config.data)
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


def write_contact_sheet(config: PretrainConfig, count: int, out: Path) -> None:
    """A PNG of `count` pairs of views, four pairs a row: the query view left, its positive key right.

    Raises:
        UserError: the images cannot be read, or the file cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: a contact sheet is a .png file")
    pairs = view_pairs(config, count)
    sheet = make_grid(pairs.flatten(0, 1), nrow=8, padding=4, pad_value=255)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(out)
    except OSError as error:
        raise file_error(f"{out} cannot be written: {error.strerror or error}", error) from error
