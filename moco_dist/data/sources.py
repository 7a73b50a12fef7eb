"""Where images come from: finds those of a data set in whatever it is stored, and opens them for reading.

What decodes needs torch, and is imported where it is used: to find the images of a folder takes no torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image

from moco_dist.config.pretrain import DataConfig
from moco_dist.data.beton import PACKED_SUFFIX
from moco_dist.data.folder import folder_images, read_bytes
from moco_dist.data.images import ImageFolder, subset
from moco_dist.data.tar.layout import find_shards
from moco_dist.errors import UserError


def find_images(
    root: Path, split: Literal["train", "val"], remember: bool = True, index_folder: Path | None = None
) -> ImageFolder:
    """The images of one split of a data set, whatever it is stored in.

    Where there are several ranks, one of each host calls it, within `once_a_host`.

    Args:
        root: the data set's folder, a packed file, or tar shards as `find_shards` takes them.
        split: `train` or `val`.
        remember: whether an index of a large data set may be written.
        index_folder: where the index lies if the data set's folder cannot be written.

    Raises:
        UserError: there is no such data set, no image in it, or `val` has a class that `train` lacks.
    """
    if root.suffix == PACKED_SUFFIX:
        from moco_dist.data.packed import packed_images

        return packed_images(root, split)
    if shards := find_shards(root):
        from moco_dist.data.tar.source import tar_splits

        splits = tar_splits(root, shards, remember, index_folder)
        if split not in splits:
            raise UserError(
                f"{root} has no validation set; tar shards of one have val or validation in their names, or lie in a "
                "folder that is called so"
            )
        return splits[split]
    return folder_images(root, split, remember, index_folder)


def find_training_images(data: DataConfig, index_folder: Path | None = None) -> ImageFolder:
    """The images that a pre-training goes over: those of `train`, `data.max_samples` of them.

    Args:
        data: where they are, and how many of them to take.
        index_folder: see `find_images`.

    Raises:
        UserError: see `find_images`.
    """
    return subset(find_images(data.root, "train", index_folder=index_folder), data.max_samples)


def find_splits(root: Path, remember: bool = True) -> dict[str, ImageFolder]:
    """`find_images` of `train`, and of `val` where there is one."""
    if shards := find_shards(root):
        from moco_dist.data.tar.source import tar_splits

        return tar_splits(root, shards, remember, None)
    found = {"train": find_images(root, "train", remember)}
    if root.suffix == PACKED_SUFFIX:
        from moco_dist.data.packed import has_split

        has_val = has_split(root, "val")
    else:
        has_val = (root / "val").is_dir()
    if has_val:
        found["val"] = find_images(root, "val", remember)
    return found


def bytes_reader(folder: ImageFolder) -> Callable[[int], tuple[bytes | bytearray, str]]:
    """A function from an image's number to its bytes and its name; or an ImageError. A packed file has none."""
    if folder.places is not None:
        from moco_dist.data.tar.source import TarShards

        return TarShards(folder).content

    def read(i: int) -> tuple[bytes, str]:
        path = folder.root / folder.paths[i]
        return read_bytes(path), str(path)

    return read


def image_reader(folder: ImageFolder) -> Callable[[int], tuple[int, Image.Image]]:
    """A function from an image's number to the bytes that it takes and the whole image, RGB; or an ImageError."""
    if folder.root.parent.suffix == PACKED_SUFFIX and folder.root.parent.is_file():
        from moco_dist.data.packed import PackedFile

        return PackedFile(folder).image
    from moco_dist.data.decode import decode_image

    read_one = bytes_reader(folder)

    def read(i: int) -> tuple[int, Image.Image]:
        data, name = read_one(i)
        return len(data), decode_image(memoryview(data), name)

    return read
