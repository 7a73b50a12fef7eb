"""The images of tar shards: found by their index, and read at their places, without unpacking."""

import contextlib
import resource
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.data.decode import CropsFor, cut
from moco_dist.data.images import ImageFolder, Places, cannot_read
from moco_dist.data.names import Names
from moco_dist.data.storage import PlacedFile, patiently
from moco_dist.data.tar.index import tar_index
from moco_dist.data.tar.layout import Shard

SHARE_OF_DESCRIPTORS = 4  # of those that a process may have, the files it keeps open are one in so many


def tar_splits(root: Path, shards: list[Shard], remember: bool, index_folder: Path | None) -> dict[str, ImageFolder]:
    """The images of tar shards: `train`, and `val` where there is one.

    Args:
        root: the data root.
        shards: what `find_shards` has found there.
        remember: whether an index may be written.
        index_folder: where, if the folder of the shards cannot be written.

    Raises:
        UserError: a shard is damaged, or there is no training image.
    """
    index = tar_index(root, shards, remember, index_folder)
    files = [index.folder / name for name in index.shards]
    splits = {}
    for split, listed in index.lists.splits.items():
        places = Places(files, index.facts, listed.shard, listed.offset, listed.size)
        paths, classes = Names(listed.content, listed.ends), tuple(index.lists.classes)
        known_hash = index.lists.content_hashes[split]
        splits[split] = ImageFolder(index.folder, paths, listed.label, classes, places, known_hash)
    return splits


class TarShards:
    """The images of `folder`, which `tar_images` found, as a source of the reference loader's workers."""

    def __init__(self, folder: ImageFolder) -> None:
        assert folder.places is not None
        self.folder, self.places, self.root = folder, folder.places, folder.root
        self._opened: OrderedDict[int, PlacedFile] = OrderedDict()  # the one that was used last comes last
        self._most_opened = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE_OF_DESCRIPTORS)

    def __len__(self) -> int:
        return len(self.folder.paths)

    def announce(self, samples: NDArray[np.int64]) -> None:
        """Have the kernel read these images ahead."""
        with contextlib.suppress(OSError):  # told when the images are read
            for sample in samples.tolist():
                self._file(sample).announce(int(self.places.offset[sample]), int(self.places.size[sample]))

    def cut(self, sample: int, size: int, crops_for: CropsFor) -> list[Tensor]:
        """The views of one of them, as `decode.cut`."""
        data, name = self.content(sample)
        return cut(memoryview(data), name, size, crops_for)

    def content(self, sample: int) -> tuple[bytearray, str]:
        """The bytes of one of them, and what it is called in errors.

        Raises:
            ImageError: it cannot be read.
        """
        file, start, size = self._file(sample), int(self.places.offset[sample]), int(self.places.size[sample])
        name = f"{self.folder.paths[sample]} in {file.path}"
        try:
            return patiently(lambda: file.read(start, size), name), name
        except OSError as error:
            raise cannot_read(name, error) from error

    def _file(self, sample: int) -> PlacedFile:
        number = int(self.places.file[sample])
        file = self._opened.pop(number, None)
        if file is None:
            if len(self._opened) >= self._most_opened:
                self._opened.popitem(last=False)
            size, mtime_ns = self.places.facts[number]
            path = self.places.files[number]
            assert isinstance(path, Path), path
            file = PlacedFile(path, (size, mtime_ns))
        self._opened[number] = file
        return file
