"""A list of images and their classes, wherever they lie, and what can be chosen of it."""

import errno
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moco_dist.errors import EXIT_IO, UserError

NO_CLASS = -1  # label of an image that lies in no class folder
# What the system answers about a name that cannot be a file's, such as a folder's or a pipe's.
NO_FILE = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


class MissingDataError(UserError):
    """Where a data set should be, there is none: a wrong path, or a disk that is not mounted."""


class ImageError(UserError):
    """An image file that cannot be read; names the file and the reason."""


class ImageStorageError(ImageError):
    """An image that was listed and whose storage does not give it. What came of it is no mistake of the user's."""

    exit_status = EXIT_IO


def cannot_read(name: str, error: OSError) -> ImageError:
    """The exception for an image that the operating system does not give."""
    kind = ImageError if error.errno in NO_FILE else ImageStorageError
    return kind(f"cannot read image {name}: {(error.strerror or str(error)).lower()}")


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
