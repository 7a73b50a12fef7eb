"""Which parquet files a source means, and of which split each of them is."""

import re
from pathlib import Path
from typing import NamedTuple

from moco_dist.config.address import Url
from moco_dist.config.loading import is_pattern
from moco_dist.data.images import MissingDataError
from moco_dist.data.layout import PARQUET_SUFFIX, holds_images, is_left_out, parquet_below
from moco_dist.data.remote.store import Object, apart, asked, can_list, list_folder, look_at
from moco_dist.data.tar.layout import COMPRESSED, SPLIT_FOLDERS, TAR_SUFFIX, expand, of_splits, split_by_name
from moco_dist.errors import UserError, nearest

_OF_SO_MANY = re.compile(r"(.*)-(\d+)-of-(\d+)")
_DEEPEST = 3  # folders of a store that are looked into


class ParquetFile(NamedTuple):
    """A parquet file; `split` is train, val or "", and `known` what a store or the disk says of it."""

    path: Path | Url
    split: str
    known: Object


def find_parquet(source: Path | Url) -> list[ParquetFile]:
    """The parquet files that `source` means, sorted; none where it is something else.

    It may be a file, a brace pattern, or a folder in which they lie as the hub has them: `train-00000-of-00010.parquet`
    in it or in `data`, or in folders that are called `train` and `validation`. Those of test are left out.

    Raises:
        UserError: one is missing, or they are of several data sets.
        InfrastructureError: the store does not answer.
    """
    if source.suffix == PARQUET_SUFFIX:
        found = apart(lambda: _named(source)) if isinstance(source, Url) else _named(source)
        return of_splits([_of_split(path, known, path.parent) for path, known in found], source)
    if isinstance(source, Url):
        is_tar = "{" in source or source.name.lower().endswith((TAR_SUFFIX, *COMPRESSED))
        found = [] if is_tar or not can_list(source) else apart(lambda: _below_url(source, _DEEPEST))
    else:
        found = _below_folder(source)
    if not found:
        return []
    files = [_of_split(path, known, source) for path, known in sorted(found)]
    _require_one_set(source, files)
    _require_all(files)
    if not (kept := of_splits(files, source)):
        raise UserError(f"{source} has test files alone ({files[0].path.name}), and none to train on")
    return kept


def _named(source: Path | Url) -> list[tuple[Path | Url, Object]]:
    """A file, or those of a pattern."""
    if isinstance(source, Url):
        urls = [Url(name) for name in expand(source)]
        return [(url, asked(lambda url=url: look_at(url), url)) for url in urls]
    paths = [Path(name) for name in expand(str(source))] if is_pattern(source) else [source]
    if missing := [path for path in paths if not path.is_file()]:
        siblings = [file.name for file in missing[0].parent.glob(f"*{PARQUET_SUFFIX}")]
        raise MissingDataError(f"{missing[0]} is not a file{nearest(missing[0].name, siblings)}")
    return [(path, _facts(path)) for path in paths]


def _below_folder(source: Path) -> list[tuple[Path | Url, Object]]:
    if not source.is_dir() or holds_images(source):
        return []
    return [(path, _facts(path)) for path in parquet_below(source)]


def _below_url(folder: Url, depth: int) -> list[tuple[Path | Url, Object]]:
    listing = asked(lambda: list_folder(folder), folder)
    found: list[tuple[Path | Url, Object]] = [
        (folder / name, known) for name, known in listing.objects.items() if name.endswith(PARQUET_SUFFIX)
    ]
    if depth > 1 and not found:
        for name in listing.folders:
            if not is_left_out(name):
                found += _below_url(folder / name, depth - 1)
    return found


def _facts(path: Path) -> Object:
    facts = path.stat()
    return Object(facts.st_size, "", facts.st_mtime_ns)


def _of_split(path: Path | Url, known: Object, source: Path | Url) -> ParquetFile:
    split = split_by_name(path)
    if not split and path.parent != source:
        split = split_by_name(path.parent)
    return ParquetFile(path, split, known)


def _require_one_set(source: Path | Url, files: list[ParquetFile]) -> None:
    """Refuse folders of several sets, as of one in two sizes."""
    folders = []
    for file in files:
        folder = file.path.parent
        while folder != source and folder.name in (*SPLIT_FOLDERS, "test"):
            folder = folder.parent
        if folder not in folders:
            folders.append(folder)
    if len(folders) > 1:
        raise UserError(f"{source} has parquet files in {folders[0]} and {folders[1]}, which are sets of their own; "
                        "name one of them")  # fmt: skip


def _require_all(files: list[ParquetFile]) -> None:
    """Refuse a set of which files are missing, where their names say how many there are."""
    seen: dict[tuple[Path | Url, str, int], set[int]] = {}
    width = 5
    for file in files:
        if found := _OF_SO_MANY.match(file.path.name):
            width = len(found[2])
            seen.setdefault((file.path.parent, found[1], int(found[3])), set()).add(int(found[2]))
    for (folder, name, count), numbers in seen.items():
        if len(numbers) < count <= 10**6 and (missing := sorted(set(range(count)) - numbers)):
            first = f"{name}-{missing[0]:0{width}d}-of-{count:0{width}d}{PARQUET_SUFFIX}"
            raise MissingDataError(f"{folder / first} is missing: {len(missing):,} of the {count:,} files of {name}")
