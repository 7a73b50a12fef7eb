"""A list of images and their classes, wherever they lie, and what can be chosen of it."""

import errno
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moco_dist.config.address import Url
from moco_dist.data.names import Names, hash_of_list
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


class Places(NamedTuple):
    """Where images lie in files that hold many.

    Attributes:
        files: paths of the files, or addresses.
        facts: size in bytes and modification time in ns of each, as they were when it was listed.
        file: (N,) int32, index into `files`.
        offset, size: (N,) int64, bytes.
        tags: entity tag of each file at an address; empty for files on disks.
    """

    files: Sequence[Path | Url]
    facts: list[list[int]]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class ImageFolder:
    """The images of a split, in the order of their paths.

    Attributes:
        root: the folder that paths are relative to, or that holds the files they lie in; a packed file's is FILE/SPLIT.
        paths: N relative paths with `/` between folders, sorted. They lie in arrays: looking up a string of a list
            changes its reference count, so that each worker would copy the list bit by bit.
        labels: (N,) int64, indices into `classes`; NO_CLASS for images of no class.
        classes: names in the order of their labels: sorted, unless a packed file says another order.
        places: where the images lie in files that hold many; None: each is a file, or in a packed one.
        known_content_hash: `content_hash` where an index has it: for millions of images it takes seconds.
        packed_rows: (N,) int64, the images' rows in the packed file of a disk that they lie in; else None.
    """

    root: Path | Url
    paths: Names
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    places: Places | None = None
    known_content_hash: str = ""
    packed_rows: NDArray[np.int64] | None = None

    @property
    def disk_root(self) -> Path:
        """`root` where it is asked for by what reads files alone."""
        assert isinstance(self.root, Path), self.root
        return self.root

    @functools.cached_property
    def list_hash(self) -> str:
        """SHA-256 in hex digits of the paths in their order."""
        return self.paths.digest()

    @functools.cached_property
    def content_hash(self) -> str:
        """The same of what an image is called whatever the set is stored in, by `content_name`."""
        return self.known_content_hash or hash_of_contents(self.paths, self.labels)

    @property
    def class_names_hash(self) -> str:
        """The same of the classes' names; "" where these are numbers, as WebDataset's are, for want of names."""
        return "" if all(map(str.isdigit, self.classes)) else hash_of_list(self.classes)


def hash_of_contents(paths: Iterable[str], labels: NDArray[np.int64]) -> str:
    """`ImageFolder.content_hash` of images."""
    return hash_of_list(map(content_name, paths, labels.tolist()))


def content_name(path: str, label: int) -> str:
    """LABEL/NAME without a suffix: WebDataset calls a.JPEG in the first of the classes a.jpg with the label 0."""
    name = path if label == NO_CLASS else path.partition("/")[2]
    folder, slash, base = name.rpartition("/")
    return f"{label}/{folder}{slash}{base.rpartition('.')[0]}"


def subset(folder: ImageFolder, max_samples: int | None) -> ImageFolder:
    """`max_samples` images spread evenly over the sorted paths, so about the same share of every class; None: all."""
    total = len(folder.paths)
    if max_samples is None or max_samples >= total:
        return folder
    return rows_of(folder, np.arange(max_samples) * total // max_samples)


def rows_of(folder: ImageFolder, rows: NDArray[np.int64]) -> ImageFolder:
    """Some of the images, in the order of `rows`; the classes stay."""
    paths, places = folder.paths, folder.places
    if places is not None:
        places = places._replace(file=places.file[rows], offset=places.offset[rows], size=places.size[rows])
    packed_rows = None if folder.packed_rows is None else folder.packed_rows[rows]
    return replace(
        folder, paths=paths.take(rows), labels=folder.labels[rows], places=places, packed_rows=packed_rows,
        known_content_hash="",
    )  # fmt: skip


def share_of_classes(labels: NDArray[np.int64], share: float, seed: list[int], leave: int = 0) -> NDArray[np.bool_]:
    """(N,) whether each image is chosen: `share` of every class, rounded up, but at least `leave` are not."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        chosen[rows[: min(len(rows) - leave, math.ceil(share * len(rows)))]] = True
    return chosen
