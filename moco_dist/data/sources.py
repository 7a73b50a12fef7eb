"""Where images come from: finds those of a data set in whatever it is stored, and opens them for reading."""

from pathlib import Path
from typing import Literal

from moco_dist.data.folder import folder_images
from moco_dist.data.images import ImageFolder
from moco_dist.data.packed import PACKED_SUFFIX, packed_images


def find_images(root: Path, split: Literal["train", "val"], remember: bool = True) -> ImageFolder:
    """The images of one split of a data set, whatever it is stored in.

    Args:
        root: the data set's folder, or a packed file.
        split: `train` or `val`.
        remember: whether an index may be written into a large folder.

    Raises:
        UserError: there is no such data set, no image in it, or `val` has a class that `train` lacks.
    """
    if root.suffix == PACKED_SUFFIX:
        return packed_images(root, split)
    return folder_images(root, split, remember)
