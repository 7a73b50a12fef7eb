"""Which tar files a data root means, and of which split each of them is."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from moco_dist.config.address import Url
from moco_dist.config.loading import is_pattern
from moco_dist.data.images import MissingDataError
from moco_dist.data.layout import folder_names, holds_images, is_image, is_left_out, split_of
from moco_dist.errors import UserError, nearest

TAR_SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.zstd", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tbz", ".tar.lz4")
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val"}  # names of folders that are no class
MOST_SHARDS = 1_000_000  # that a pattern may name

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LISTED = 3  # files that a message names


class AnyShard(Protocol):
    """A tar file, on a disk or at an address; `split` is train or val where its name or its folder says so, else ""."""

    @property
    def path(self) -> Path | Url: ...
    @property
    def split(self) -> str: ...


S = TypeVar("S", bound=AnyShard)


class Shard(NamedTuple):
    """A tar file on a disk."""

    path: Path
    split: str


def find_shards(root: Path) -> list[Shard]:
    """The tar shards that `root` means, sorted; none where its images are stored in another way.

    `root` may be a folder that holds shards (`*train*.tar` and `*val*.tar`, or all of them for training), a folder of
    `train/*.tar` and `val/*.tar`, a brace pattern, or one tar file. A pattern or file of training shards means those
    of validation too, where there are some whose names have `val` or `validation` for `train`.

    Raises:
        UserError: shards are missing, compressed, or of no split beside others that are of one.
    """
    if is_pattern(root):
        return _of_pattern(root)
    if root.is_dir():
        return _of_folder(root)
    if root.name.lower().endswith(COMPRESSED) and root.is_file():
        raise compressed([root], root)
    if root.suffix != TAR_SUFFIX:
        return []
    if not root.is_file():
        siblings = [file.name for file in root.parent.glob("*.tar")]
        raise MissingDataError(f"data root {root} is not a file{nearest(root.name, siblings)}")
    return [Shard(root, split_by_name(root)), *_validation_beside(root, root.name)]


def common_folder(shards: Sequence[Shard]) -> Path:
    """The folder that all of them lie in, or below."""
    folders = {shard.path.parent for shard in shards}
    first = min(folders)
    return next(folder for folder in (first, *first.parents) if all(other.is_relative_to(folder) for other in folders))


def compressed(files: Sequence[Path | Url], root: Path | Url) -> UserError:
    """That these files are compressed, and what can be done."""
    return UserError(
        f"{_listed(files)} {'is' if len(files) == 1 else 'are'} compressed, so that no image in it can be read alone; "
        f"moco-dist data pack {root} OUT.beton makes a file in which it can"
    )


def expand(pattern: str) -> list[str]:
    """The names that a pattern of `{a,b}` and `{000..127}` stands for, as a shell expands it.

    Raises:
        UserError: a brace is not closed, what is in it is neither, or the names are too many.
    """
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, commas, end = 0, [start], -1
    for at in range(start, len(pattern)):
        depth += (pattern[at] == "{") - (pattern[at] == "}")
        if pattern[at] == "," and depth == 1:
            commas.append(at)
        if not depth:
            end = at
            break
    if end < 0:
        raise UserError(f"{pattern} has a {{ without its }}; a pattern is written like set-train-{{0000..1023}}.tar")
    commas.append(end)
    choices = [pattern[a + 1 : b] for a, b in itertools.pairwise(commas)]
    if len(choices) == 1:
        found = _RANGE.fullmatch(choices[0])
        if not found or int(found[2]) < int(found[1]):
            raise UserError(
                f"{{{choices[0]}}} is neither a range such as {{0000..1023}} nor a choice such as {{train,val}}"
            )
        first, last = found[1], found[2]
        if int(last) - int(first) >= MOST_SHARDS:
            raise UserError(f"{{{choices[0]}}} names more than {MOST_SHARDS:,} shards")
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = [name for choice in choices for name in expand(choice)]
    rest = expand(pattern[end + 1 :])
    if len(choices) * len(rest) > MOST_SHARDS:
        raise UserError(f"{pattern} names more than {MOST_SHARDS:,} shards")
    return [pattern[:start] + choice + tail for choice in choices for tail in rest]


def _of_pattern(root: Path) -> list[Shard]:
    paths = [Path(name) for name in expand(str(root))]
    if packed := [path for path in paths if path.name.lower().endswith(COMPRESSED)]:
        raise compressed(packed, root.parent)
    if others := [path for path in paths if path.suffix != TAR_SUFFIX]:
        raise UserError(f"{others[0]}, which {root} names, is no tar file; shards are called NAME{TAR_SUFFIX}")
    if missing := [path for path in paths if not path.is_file()]:
        raise MissingDataError(f"{missing[0]} is missing: {len(missing):,} of the {len(paths):,} shards of {root}")
    shards = [Shard(path, split_by_name(path) or SPLIT_FOLDERS.get(path.parent.name, "")) for path in paths]
    if not any(shard.split == "val" for shard in shards):
        shards += _validation_beside(root, root.name.partition("{")[0])
    return of_splits(shards, root)


def _of_folder(root: Path) -> list[Shard]:
    with os.scandir(root) as entries:
        names = {entry.name for entry in entries if not is_left_out(entry.name)}
    in_splits = [name for name in SPLIT_FOLDERS if name in names and _tars(root / name)]
    if any(not holds_images(root / name) for name in in_splits):
        if {"val", "validation"} <= set(in_splits):
            raise UserError(f"{root} has shards in val and in validation; rename one of the two folders")
        if "train" not in in_splits:
            raise UserError(f"{root / in_splits[0]} has tar shards, and {root / 'train'} has none")
        return [Shard(path, SPLIT_FOLDERS[name]) for name in in_splits for path in _tars(root / name)]
    tars, packed = _tars(root), sorted(root / name for name in names if name.lower().endswith(COMPRESSED))
    if not tars and not packed:
        return []
    if any(map(is_image, names)) or any(holds_images(root / name) for name in folder_names(root)):
        return []  # a folder of images, and an archive that lies there too
    if unreadable := [path for path in packed if not tars or split_by_name(path) in ("train", "val")]:
        raise compressed(unreadable, root)
    return of_splits([Shard(path, split_by_name(path)) for path in tars], root)


def of_splits(shards: list[S], root: Path | Url) -> list[S]:
    """Those of training and validation; where no name speaks of a split, the members' folders decide, or all train."""
    shards = [shard for shard in shards if shard.split != "test"]
    splits = {shard.split for shard in shards}
    if "" in splits and len(splits) > 1:
        others = [shard.path.name for shard in shards if not shard.split]
        raise UserError(
            f"{root}: {others[0]} has neither train nor val in its name, which others have; rename it, or move it away"
        )
    if splits == {"val"}:
        raise UserError(f"{root} has validation shards ({shards[0].path.name}), and none with train in their names")
    return shards


def _validation_beside(root: Path, prefix: str) -> list[Shard]:
    """The shards whose names begin like `prefix`, with `val` or `validation` for its `train`."""
    found = re.search(r"(?<![a-z])train(ing)?(?![a-z])", prefix)
    if not found:
        return []
    for word in ("val", "validation"):
        name = prefix[: found.start()] + word + prefix[found.end() :]
        # A whole name means one file; the beginning of a pattern's all that begin so.
        whole = name.endswith(TAR_SUFFIX)
        paths = [path for path in _tars(root.parent) if (path.name == name if whole else path.name.startswith(name))]
        if paths:
            return [Shard(path, "val") for path in paths]
    return []


def split_by_name(path: Path | Url) -> str:
    """train, val, test, or "": what a shard's name speaks of."""
    found = split_of(path.name)
    return found[0] if found else ""


def _tars(folder: Path) -> list[Path]:
    """Sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == TAR_SUFFIX and not is_left_out(path.name))


def _listed(paths: Sequence[Path | Url]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(map(str, paths[:_LISTED])) + more
