"""Images on disk: which there are, their classes, and how one is read."""

import io
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco_dist.data.index import image_paths
from moco_dist.data.storage import read_patiently
from moco_dist.errors import UserError, nearest

warnings.filterwarnings("ignore", module="PIL")  # what PIL finds odd and reads all the same: no matter for a user

PACKED_SUFFIX = ".beton"  # of a file that `moco-dist data pack` wrote
NO_CLASS = -1  # label of an image that lies in no class folder


class ImageError(UserError):
    """An image file that cannot be read; names the file and the reason."""


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, in the order of their paths.

    Attributes:
        root: the folder that paths are relative to.
        paths: N relative paths with `/` between folders, sorted.
        labels: (N,) int64, indices into `classes`; NO_CLASS for images directly in `root`.
        classes: names of the folders directly in `root`, sorted.
    """

    root: Path
    paths: list[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def find_images(root: Path, split: Literal["train", "val"], remember: bool = True) -> ImageFolder:
    """The images of one split: of ROOT/train or ROOT/val, or of ROOT itself for training where it has neither.

    An image's class is the first folder on its way, at any depth below; hidden files and folders are left out.
    Labels of `val` are those of `train`, even where `val` lacks some of the classes.

    Args:
        root: the data set's folder, or a packed file.
        split: `train` or `val`.
        remember: whether an index may be written into a large folder.

    Raises:
        UserError: there is no such folder, no image in it, or `val` has a class that `train` lacks.
    """
    if root.suffix == PACKED_SUFFIX:
        from moco_dist.data.ffcv_loader import packed_images  # which builds on this module

        return packed_images(root, split)
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder{nearest(root.name, _folder_names(root.parent))}")
    train, val = root / "train", root / "val"
    if split == "val" and not val.is_dir():
        raise UserError(
            f"{root} has no validation set; one is laid out as {val}/CLASS/IMAGE beside {train}/CLASS/IMAGE"
        )
    if split == "train" and not train.is_dir():
        if val.is_dir():
            raise UserError(f"{root} has a folder val but none called train{nearest('train', _folder_names(root))}")
        train = root
    folder = train if split == "train" else val
    classes = _folder_names(train if train.is_dir() else val)
    if split == "val":
        for name in _folder_names(val):
            if name not in classes:
                raise UserError(f"{val} has a class {name} that {train} lacks{nearest(name, classes)}")
    paths = image_paths(folder, remember)
    if not paths:
        raise UserError(f"no image found in {folder}; files called {', '.join(IMG_EXTENSIONS)} count as images")
    label_of = {name: label for label, name in enumerate(classes)}
    firsts = (path.partition("/") for path in paths)
    labels = [label_of[first] if below else NO_CLASS for first, below, _ in firsts]
    return ImageFolder(folder, paths, np.array(labels, dtype=np.int64), tuple(classes))


def subset(folder: ImageFolder, max_samples: int | None) -> ImageFolder:
    """`max_samples` images spread evenly over the sorted paths, so about the same share of every class; None: all."""
    total = len(folder.paths)
    if max_samples is None or max_samples >= total:
        return folder
    return rows_of(folder, np.arange(max_samples) * total // max_samples)


def rows_of(folder: ImageFolder, rows: NDArray[np.int64]) -> ImageFolder:
    """Some of the images, in the order of `rows`; the classes stay."""
    return ImageFolder(folder.root, [folder.paths[i] for i in rows], folder.labels[rows], folder.classes)


def share_of_classes(labels: NDArray[np.int64], share: float, seed: list[int], leave: int = 0) -> NDArray[np.bool_]:
    """(N,) whether each image is chosen: `share` of every class, rounded up, but at least `leave` are not."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        chosen[rows[: min(len(rows) - leave, math.ceil(share * len(rows)))]] = True
    return chosen


def read_bytes(path: Path) -> bytes:
    """The content of an image file, by `read_patiently`. Whole images are read nowhere else, but inside DALI.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        return read_patiently(path)
    except OSError as error:
        raise ImageError(f"cannot read image {path}: {(error.strerror or str(error)).lower()}") from error


def decode_image(data: bytes | memoryview, name: str) -> Image.Image:
    """An image as RGB, converted as torchvision's default loader does, but for pixels of 16 bits.

    PIL cuts those off at 255, so that all but the darkest become white; here the upper 8 bits are taken.

    Args:
        data: the file's content.
        name: the file's, for the error.

    Raises:
        ImageError: it is empty, truncated, damaged, of 32-bit pixels (their range is not known), or larger than PIL's
            limit (an attack's sign).
    """
    try:
        if not data:
            raise ValueError("the file is empty")
        image = Image.open(io.BytesIO(data))
        if image.mode in ("I", "F"):
            raise ValueError("its pixels are 32-bit numbers of unknown range; save it with 8 or 16 bits")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"cannot read image {name}: not an image") from error
    except Exception as error:  # on damaged files PIL's decoders raise anything from OSError to struct.error
        raise ImageError(f"cannot read image {name}: {str(error) or type(error).__name__}") from error


def _folder_names(folder: Path) -> list[str]:
    """Sorted names of the visible folders in `folder`; none where it does not exist."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
