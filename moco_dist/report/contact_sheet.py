"""Pairs of views for people to look at, in a report or as a picture of their own."""

import sys
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import pairs
from moco_dist.errors import UserError, file_error


def pairs_for_report(config: PretrainConfig, count: int) -> Tensor | None:
    """`view_pairs` of the run's images; None, and a warning on stderr, where the images cannot be read."""
    try:
        return pairs.view_pairs(config, count)
    except (UserError, OSError) as error:
        print(f"warning: no pairs of views: {error}; --data-root says where the images are now", file=sys.stderr)
        return None


def write_contact_sheet(config: PretrainConfig, count: int, out: Path) -> None:
    """A PNG of `count` pairs of views, four pairs a row: the query view left, its positive key right.

    Raises:
        UserError: the images cannot be read, or the file cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: a contact sheet is a .png file")
    try:
        save_sheet(pairs.view_pairs(config, count), out)
    except OSError as error:
        raise file_error(f"{out} cannot be written: {error.strerror or error}", error) from error


def save_sheet(view_pairs: Tensor, out: Path) -> None:
    """The PNG itself; `view_pairs` is uint8 (N, 2, 3, S, S).

    Raises:
        OSError: it cannot be written.
    """
    sheet = make_grid(view_pairs.flatten(0, 1), nrow=8, padding=4, pad_value=255)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(out)
