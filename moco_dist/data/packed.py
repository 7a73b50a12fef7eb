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
from moco_dist.data.names import Names
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
    return images_of_split(opened(path), path, split)


def images_of_split(beton: Beton, path: Path | Url, split: str) -> ImageFolder:
    """`packed_images` of an open file. Its classes have the order that its labels say.

    Raises:
        UserError: it has no such split.
    """
    names = beton.names
    paths = [name.removeprefix(f"{split}/") for name in names if name.startswith(f"{split}/")]
    if not paths:
        raise UserError(f"{path} has no {'validation' if split == 'val' else 'training'} images")
    number_of: dict[str, int] = {}
    for name, number in zip(names, beton.labels.tolist(), strict=True):
        if name.count("/") > 1:
            number_of.setdefault(name.split("/", 2)[1], number)
    classes = sorted(number_of, key=lambda name: (number_of[name], name))
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of[path.partition("/")[0]] if "/" in path else NO_CLASS for path in paths]
    return ImageFolder(path / split, Names.of(paths), np.array(labels, dtype=np.int64), tuple(classes))


def has_split(path: Path, split: str) -> bool:
    """Whether a packed file has images of a split."""
    return any(name.startswith(f"{split}/") for name in opened(path).names)


class PackedFile:
    """The images of `folder`, which `packed_images` found, as a source of the reference loader's workers."""

    def __init__(self, folder: ImageFolder) -> None:
        self.root, self.folder = folder.disk_root.parent, folder
        self._beton: Beton | None = opened(self.root)
        self._file = PlacedFile(self.root)
        row_of = {name: row for row, name in enumerate(self._beton.names)}
        self._rows = np.array([row_of[f"{folder.root.name}/{path}"] for path in folder.paths])

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
        name = f"{self.folder.root / self.folder.paths[sample]}"
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
            self._beton = opened(self.root)
        return self._beton


def opened(path: Path) -> Beton:
    """`read_beton`, once a process for each version of a file."""
    try:
        facts = path.stat()
    except OSError as error:
        raise file_error(f"{path} cannot be read: {(error.strerror or str(error)).lower()}", error) from error
    return _opened(path, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=2)
def _opened(path: Path, mtime_ns: int, size: int) -> Beton:
    return read_beton(path)
