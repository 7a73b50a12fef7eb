"""Pictures for people to look at, in a report or as files of their own: pairs of views, and whole images."""

import contextlib
import sys
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from moco_dist.config.address import Url
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import pairs
from moco_dist.data.images import ImageError
from moco_dist.data.sources import find_images, image_reader
from moco_dist.errors import UserError, file_error
from moco_dist.report.page import Stored
from moco_dist.run.results import NeighbourRow


def pairs_for_report(config: PretrainConfig, count: int, index_folder: Path) -> Tensor | None:
    """`view_pairs` of the run's images; None, and a warning on stderr, where the images cannot be read."""
    try:
        return pairs.view_pairs(config, count, index_folder)
    except (UserError, OSError) as error:
        print(f"warning: no pairs of views: {error}; --data-root says where the images are now", file=sys.stderr)
        return None


def stored_images(rows: list[NeighbourRow], root: Path | Url, index_folder: Path) -> Stored:
    """Those images of `rows` that are no files of their own: they lie in tar shards, in a packed file or at an address.

    Args:
        rows: test images and their neighbours.
        root: the data root.
        index_folder: the run's.

    Returns:
        the images, each by its split and by what `rows` calls it; without those that cannot be read.
    """
    found: Stored = {}
    of_train = [file for row in rows for file in row.neighbours]
    splits: dict[Literal["val", "train"], list[Path | Url]] = {"val": [row.query for row in rows], "train": of_train}
    for split, files in splits.items():
        wanted = {str(file): file for file in files if isinstance(file, Url) or not file.is_file()}
        if not wanted:
            continue
        with contextlib.suppress(UserError, OSError):
            images = find_images(root, split, index_folder=index_folder)
            read = image_reader(images)
            for number, path in enumerate(images.paths):
                if file := wanted.get(f"{images.root}/{path}"):
                    with contextlib.suppress(ImageError):
                        found[split, file] = read(number)[1]
    return found


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
