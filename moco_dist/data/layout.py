"""How a folder of images is laid out: ROOT/train and ROOT/val, or class folders; and what looks like it and is not."""

import itertools
import os
import re
import unicodedata
from pathlib import Path

from moco_dist.config.address import Url
from moco_dist.data.images import MissingDataError
from moco_dist.errors import UserError, nearest

# Which files count as images. They are those of torchvision, whose import takes longer than listing a data set.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
PARQUET_SUFFIX = ".parquet"
# What file systems, file servers and archivers put among people's folders, with images in it that are nobody's.
_LEFT_OUT = {"lost+found", "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information"}
_FILES_LOOKED_AT = 1000  # of a folder, to know what it holds
_FOLDERS_LOOKED_INTO = 16  # of those that would be classes, whether each is a data set
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
           "test": "test", "testing": "test"}  # fmt: skip
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})([ _-]?set)?(?![a-z])")


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image, before anybody has looked into it."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_left_out(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set: hidden ones, and a system's own."""
    return name.startswith(".") or name.casefold() in _LEFT_OUT


def folder_names(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder` that count; none where it does not exist."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_left_out(entry.name) and entry.is_dir())


def require_layout(root: Path, names: list[str]) -> None:
    """Refuse a layout in which a folder would silently be left out, or be taken for a class though it is a split.

    Args:
        root: the data set's folder.
        names: of the folders in it.

    Raises:
        UserError: beside ROOT/train there are images that are in no split, or splits have other names, or lie deeper.
    """
    if "train" in names:
        others = [name for name in names if name not in ("train", "val") and split_of(name) != ("test", "")]
        others = [name for name in others if holds_images(root / name)]
        if others:
            hint = next((f" (validation images lie in val: did you mean that by {name}?)" for name in others
                         if split_of(name) == ("val", "") and "val" not in names), "")  # fmt: skip
            raise UserError(
                f"{root} has images in {_listed(others)} beside train, which would be left out{hint}; "
                f"if train is a class like them, lay out {root / 'train' / others[0]} and {root / 'train' / 'train'}, "
                f"else move them away or name {root / 'train'}"
            )
    elif "val" not in names:
        if pair := _splits_among(names):
            raise UserError(
                f"{root} has folders {' and '.join(pair)}, which would be two classes; "
                f"splits are called train and val: rename them, or name one of them"
            )
        for name in names[:_FOLDERS_LOOKED_INTO]:
            if pair := _splits_among(folder_names(root / name)):
                raise UserError(
                    f"{root / name} has folders {' and '.join(pair)}, which would be one class, {name}; "
                    f"did you mean {root / name}?"
                )
        if len(names) == 1 and split_of(names[0]) == ("train", ""):
            raise UserError(
                f"{root} has one folder, {names[0]}, which would be one class; did you mean {root / names[0]}?"
            )


def require_distinct(folder: Path | Url, classes: list[str]) -> None:
    """Refuse classes that look the same, because they are one name in two Unicode forms.

    Raises:
        UserError: two classes do.
    """
    seen: dict[str, str] = {}
    for name in classes:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise UserError(f"two classes of {folder} look the same: {twin!a} and {name!a}; make them one")


def no_train(root: Path, names: list[str]) -> MissingDataError:
    """The error that ROOT has a folder val and none called train."""
    meant = [name for name in names if split_of(name) == ("train", "")]
    hint = f"; did you mean {meant[0]}?" if meant else nearest("train", names)
    others = [name for name in names if name != "val" and not split_of(name)]
    if not hint and others:
        hint = f"; if val is a class like {_listed(others)}, lay out {root / 'train' / 'val'} and so on"
    return MissingDataError(f"{root} has a folder val but none called train{hint}")


def split_of(name: str) -> tuple[str, str] | None:
    """The split that a name speaks of, and the rest of the name: seg_train is ("train", "seg_"); None: of no split."""
    found = _SPLIT.search(name.casefold())
    return (_SPLITS[found[1]], name[: found.start()] + name[found.end() :]) if found else None


def _splits_among(names: list[str]) -> tuple[str, str] | None:
    """Two of the names that speak of a training set and of another split of the same thing; None: there are none."""
    spoken_of = [(name, *found) for name in names if (found := split_of(name))]
    for (one, split, rest), (other, other_split, other_rest) in itertools.combinations(spoken_of, 2):
        if rest == other_rest and split != other_split and "train" in (split, other_split):
            return one, other
    return None


def holds_images(folder: Path) -> bool:
    """Whether at least half of the first files below are images: not so in a folder of annotations, or of runs."""
    names = (name for _, _, files in os.walk(folder) for name in files if not is_left_out(name))
    looked_at = list(itertools.islice(names, _FILES_LOOKED_AT))
    images = sum(map(is_image, looked_at))
    return images > 0 and 2 * images >= len(looked_at)


def parquet_below(folder: Path) -> list[Path]:
    """Sorted parquet files in a folder, or below it as deep as the hub's repositories have them."""
    found = [path for deep in ("*", "*/*", "*/*/*") for path in folder.glob(f"{deep}{PARQUET_SUFFIX}")]
    return sorted(path for path in found if not any(map(is_left_out, path.relative_to(folder).parts)))


def is_parquet(root: Path | Url) -> UserError:
    """The error that a data root is parquet."""
    return UserError(
        f"{root} is parquet, in which reading one image means reading the row group it lies in, about 100 images; "
        f"moco-dist data pack {root} OUT.beton makes a file of it, once, in which each is read alone"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
