"""Where images come from: finds those of a data set in whatever it is stored, and opens them for reading.

What decodes needs torch, and is imported where it is used: to find the images of a folder takes no torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image

from moco_dist.config.address import Url
from moco_dist.config.pretrain import DataConfig
from moco_dist.data.beton import PACKED_SUFFIX
from moco_dist.data.folder import folder_images, read_bytes
from moco_dist.data.images import ImageFolder, MissingDataError, subset
from moco_dist.data.layout import PARQUET_SUFFIX, is_parquet, parquet_below
from moco_dist.data.tar.layout import find_shards
from moco_dist.errors import UserError


def find_images(
    root: Path | Url, split: Literal["train", "val"], remember: bool = True, index_folder: Path | None = None
) -> ImageFolder:
    """The images of one split of a data set, whatever it is stored in.

    Where there are several ranks, one of each host calls it, within `once_a_host`.

    Args:
        root: the data set's folder, a packed file, or tar shards as `find_shards` takes them; or the address of these.
        split: `train` or `val`.
        remember: whether an index of a large data set may be written.
        index_folder: where the index lies if the data set's folder cannot be written, or is at an address.

    Raises:
        UserError: there is no such data set, no image in it, or `val` has a class that `train` lacks.
        InfrastructureError: an object store does not answer.
    """
    if root.suffix == PARQUET_SUFFIX:
        raise is_parquet(root)
    if isinstance(root, Url):
        return _of_split(_remote_splits(root, index_folder), root, split)
    if root.suffix == PACKED_SUFFIX:
        from moco_dist.data.packed import packed_images

        return packed_images(root, split)
    if shards := find_shards(root):
        from moco_dist.data.tar.source import tar_splits

        return _of_split(tar_splits(root, shards, remember, index_folder), root, split)
    try:
        return folder_images(root, split, remember, index_folder)
    except MissingDataError:
        if root.is_dir() and parquet_below(root):
            raise is_parquet(root) from None
        raise


def _remote_splits(root: Url, index_folder: Path | None) -> dict[str, ImageFolder]:
    if root.suffix == PACKED_SUFFIX:
        from moco_dist.data.remote.packed import remote_packed_splits

        return remote_packed_splits(root, index_folder)
    from moco_dist.data.remote.index import remote_tar_splits

    return remote_tar_splits(root, index_folder)


def _of_split(splits: dict[str, ImageFolder], root: Path | Url, split: str) -> ImageFolder:
    if split in splits:
        return splits[split]
    if root.suffix == PACKED_SUFFIX:
        raise UserError(f"{root} has no {'validation' if split == 'val' else 'training'} images")
    raise UserError(
        f"{root} has no validation set; tar shards of one have val or validation in their names, or lie in a "
        "folder that is called so"
    )


def find_training_images(data: DataConfig, index_folder: Path | None = None) -> ImageFolder:
    """The images that a pre-training goes over: those of `train`, `data.max_samples` of them.

    Args:
        data: where they are, and how many of them to take.
        index_folder: see `find_images`.

    Raises:
        UserError: see `find_images`.
    """
    return subset(find_images(data.root, "train", index_folder=index_folder), data.max_samples)


def find_splits(root: Path | Url, remember: bool = True) -> dict[str, ImageFolder]:
    """`find_images` of `train`, and of `val` where there is one."""
    if root.suffix == PARQUET_SUFFIX:
        raise is_parquet(root)
    if isinstance(root, Url):
        return _remote_splits(root, None)
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
    """A function from an image's number to its bytes and its name; or an ImageError. A local packed file has none."""
    root = folder.root
    if isinstance(root, Url):
        from moco_dist.data.remote.source import RemoteImages

        return RemoteImages(folder).content
    if folder.places is not None:
        from moco_dist.data.tar.source import TarShards

        return TarShards(folder).content

    def read(i: int) -> tuple[bytes, str]:
        path = root / folder.paths[i]
        return read_bytes(path), str(path)

    return read


def image_reader(folder: ImageFolder) -> Callable[[int], tuple[int, Image.Image]]:
    """A function from an image's number to the bytes that it takes and the whole image, RGB; or an ImageError."""
    if isinstance(folder.root, Path) and folder.root.parent.suffix == PACKED_SUFFIX and folder.root.parent.is_file():
        from moco_dist.data.packed import PackedFile

        return PackedFile(folder).image
    from moco_dist.data.decode import decode_image

    read_one = bytes_reader(folder)

    def read(i: int) -> tuple[int, Image.Image]:
        data, name = read_one(i)
        return len(data), decode_image(memoryview(data), name)

    return read
