"""Images of one packed file (`moco-dist data pack`, or FFCV's own .beton), by the workers of the reference loader.

All processes of a machine read the file through its page cache, so it is in memory once. At the start of a batch the
kernel is told which places come next, and reads them while the first images are decoded: that is what makes a file
larger than memory fast enough, without FFCV's quasi-random order, which would change what a batch is made of.

Images are read, not mapped: a read error of mapped memory would kill the process instead of being waited out and told.
"""

import contextlib
import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moco_dist.config.address import Url
from moco_dist.data.beton import JPEG, Beton, read_beton
from moco_dist.data.decode import CropsFor, cut, cut_pixels, decode_image
from moco_dist.data.images import NO_CLASS, ImageError, ImageFolder, MissingDataError, cannot_read
from moco_dist.data.storage import PlacedFile, patiently
from moco_dist.errors import UserError, file_error, nearest


def packed_images(path: Path, split: Literal["train", "val"]) -> ImageFolder:
    """The images of one split, as `find_images` finds them in the folder that was packed; `root` is FILE/SPLIT.

    Raises:
        UserError: the file cannot be read, or has no such split.
    """
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.beton")]
        raise MissingDataError(f"data root {path} is not a file{nearest(path.name, siblings)}")
    splits = opened(path).splits
    if split not in splits:
        raise UserError(f"{path} has no {'validation' if split == 'val' else 'training'} images")
    return splits[split]


def has_split(path: Path, split: str) -> bool:
    """Whether a packed file has images of a split."""
    return split in opened(path).splits


def splits_of(beton: Beton, path: Path | Url) -> dict[str, ImageFolder]:
    """The images of an open file, `train` and `val` where there is one; classes in the order of their numbers."""
    tops, splits = beton.names.first_folders()
    depths = np.array([len(split.encode("utf-8", "surrogateescape")) + 1 for split in splits] + [0])
    paths = beton.names.below(depths[tops])
    folders, names = paths.first_folders()
    folders[tops < 0] = NO_CLASS
    first_row = np.zeros(len(names), np.int64)
    rows = np.flatnonzero(folders >= 0)[::-1]
    first_row[folders[rows]] = rows  # the one that is written last stays
    numbers = beton.labels[first_row].tolist()
    order = sorted(range(len(names)), key=lambda folder: (numbers[folder], names[folder]))
    label_of = np.full(len(names) + 1, NO_CLASS, np.int64)
    label_of[order] = np.arange(len(names))
    classes = tuple(names[folder] for folder in order)
    found = {}
    for number, split in enumerate(splits):
        if split not in ("train", "val"):
            continue
        rows = np.flatnonzero(tops == number)
        labels = label_of[folders[rows]]
        found[split] = ImageFolder(path / split, paths.take(rows), labels, classes, packed_rows=rows)
    return found


class PackedFile:
    """The images of `folder`, which `packed_images` found, as a source of the reference loader's workers."""

    def __init__(self, folder: ImageFolder) -> None:
        assert folder.packed_rows is not None
        self.root, self.folder, self._rows = folder.disk_root.parent, folder, folder.packed_rows
        self._beton: Beton | None = opened(self.root).beton
        self._file = PlacedFile(self.root)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_beton": None}  # a worker that is not a fork opens the file itself

    def announce(self, samples: NDArray[np.int64]) -> None:
        """Have the kernel read these images ahead."""
        beton = self._open()
        with contextlib.suppress(OSError):  # told when the images are read
            for row in self._rows[samples].tolist():
                self._file.announce(int(beton.start[row]), int(beton.size[row]))

    def cut(self, sample: int, size: int, crops_for: CropsFor) -> list[Tensor]:
        """The views of one of them, as `decode.cut`."""
        data, name = self._content(sample)
        if isinstance(data, bytearray):
            return cut(memoryview(data), name, size, crops_for)
        return cut_pixels(data, size, crops_for(data.shape[1], data.shape[0]))

    def image(self, sample: int) -> tuple[int, Image.Image]:
        """One of them, decoded as `decode_image` does it, and how many bytes it takes in the file.

        Raises:
            ImageError: it cannot be read.
        """
        data, name = self._content(sample)
        if isinstance(data, bytearray):
            return len(data), decode_image(memoryview(data), name)
        return data.nbytes, Image.fromarray(data)

    def _content(self, sample: int) -> tuple[bytearray | NDArray[np.uint8], str]:
        """A JPEG file or pixels (H, W, 3), and the image's name."""
        beton, row = self._open(), self._rows[sample]
        name = f"{self.folder.root}/{self.folder.paths[sample]}"  # to join by pathlib takes as long as to read
        if problem := beton.problem(row):
            raise ImageError(f"cannot read image {name}: {problem}")
        try:
            data = patiently(lambda: self._file.read(int(beton.start[row]), int(beton.size[row])), name)
        except OSError as error:
            raise cannot_read(name, error) from error
        if beton.mode[row] == JPEG:
            return data, name
        return np.frombuffer(data, np.uint8).reshape(int(beton.height[row]), int(beton.width[row]), 3), name

    def _open(self) -> Beton:
        if self._beton is None:
            self._beton = opened(self.root).beton
        return self._beton


class Opened:
    """A packed file and what is in it.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.beton = path, read_beton(path)

    @functools.cached_property
    def splits(self) -> dict[str, ImageFolder]:
        """`splits_of` the file."""
        return splits_of(self.beton, self.path)


def opened(path: Path) -> Opened:
    """A packed file, read once a process for each version of it."""
    try:
        facts = path.stat()
    except OSError as error:
        raise file_error(f"{path} cannot be read: {(error.strerror or str(error)).lower()}", error) from error
    return _opened(path, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=2)
def _opened(path: Path, mtime_ns: int, size: int) -> Opened:
    return Opened(path)
