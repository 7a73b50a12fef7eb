"""Images in folders: which there are, their classes, and how a file is read."""

from pathlib import Path
from typing import Literal

from moco_dist.data.images import ImageFolder, MissingDataError, cannot_read
from moco_dist.data.index import indexed_images
from moco_dist.data.layout import IMAGE_SUFFIXES, folder_names, no_train, require_distinct, require_layout
from moco_dist.data.storage import read_patiently
from moco_dist.errors import UserError, nearest


def folder_images(
    root: Path, split: Literal["train", "val"], remember: bool = True, index_folder: Path | None = None
) -> ImageFolder:
    """The images of one split: of ROOT/train or ROOT/val, or of ROOT itself for training where it has neither.

    An image's class is the first folder of its path, however deep it lies; what `is_left_out` names is left out.
    Labels of `val` are those of `train`, even where `val` lacks some of the classes.

    Args:
        root: the data set's folder.
        split: `train` or `val`.
        remember: whether an index of a large folder may be written.
        index_folder: where, if not into the folder itself.

    Raises:
        MissingDataError: there is no such folder, no such split in it, or no image in that.
        UserError: the layout leaves images out, or `val` has a class that `train` lacks.
    """
    if not root.is_dir():
        raise MissingDataError(f"data root {root} is not a folder{nearest(root.name, folder_names(root.parent))}")
    names = folder_names(root)
    require_layout(root, names)
    train, val = root / "train", root / "val"
    if split == "val" and "val" not in names:
        raise MissingDataError(
            f"{root} has no validation set; one is laid out as {val}/CLASS/IMAGE beside {train}/CLASS/IMAGE"
        )
    if split == "train" and "train" not in names:
        if "val" in names:
            raise no_train(root, names)
        train = root
    folder = train if split == "train" else val
    classes = folder_names(train if train.is_dir() else val)
    require_distinct(folder, classes)
    if split == "val":
        for name in folder_names(val):
            if name not in classes:
                raise UserError(f"{val} has a class {name} that {train} lacks{nearest(name, classes)}")
    paths, labels, content_hash = indexed_images(folder, classes, remember, index_folder)
    if not paths:
        raise MissingDataError(f"no image found in {folder}; files called {', '.join(IMAGE_SUFFIXES)} count as images")
    return ImageFolder(folder, paths, labels, tuple(classes), known_content_hash=content_hash)


def read_bytes(path: Path | str) -> bytes:
    """The content of an image file, by `read_patiently`. Nothing else but DALI reads whole images.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        return read_patiently(path)
    except OSError as error:
        raise cannot_read(str(path), error) from error
