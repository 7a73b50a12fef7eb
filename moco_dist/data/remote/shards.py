"""Which tar shards an address means, by the rules of `tar.layout`, and what their store says of them."""

import errno
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from moco_dist.config.address import Url
from moco_dist.data.images import MissingDataError
from moco_dist.data.layout import PARQUET_SUFFIX, is_image, is_left_out, is_parquet, split_of
from moco_dist.data.remote.store import Listing, Object, asked, can_list, list_folder, look_at
from moco_dist.data.tar.layout import COMPRESSED, SPLIT_FOLDERS, TAR_SUFFIX, expand, of_splits, split_by_name
from moco_dist.data.tar.listing import CLASS_NAMES
from moco_dist.errors import UserError, nearest

INDEX_NAME = "moco_dist.idx"  # beside the shards, if somebody has put it there
_FOLDERS_LOOKED_INTO = 4  # for parquet, where there are no shards
ASKED_AT_ONCE = 16  # objects of a server that cannot list them


class RemoteShard(NamedTuple):
    """A tar file at an address, and what it was when it was listed."""

    path: Url
    split: str
    known: Object


class RemoteSet(NamedTuple):
    """The shards of a data set.

    Attributes:
        folder: that they lie in, or below.
        shards: in the order of their names.
        class_names: of `classes.txt` beside them; None: there is none.
        index: of `moco_dist.idx` beside them; None: there is none.
    """

    folder: Url
    shards: list[RemoteShard]
    class_names: Object | None
    index: Object | None


def find_remote_shards(root: Url) -> RemoteSet:
    """The shards that `root` means: a folder of them, a brace pattern or one file, as `tar.layout.find_shards` has it.

    Raises:
        MissingDataError: there are none.
        UserError: they are compressed, or of no split beside others that are of one; or the store refuses.
        InfrastructureError: the store does not answer.
    """
    if "*" in root:
        raise UserError(f"{root}: * is no pattern here; name the folder, or write {{0000..1023}} for numbers")
    lists = _Listings()
    if "{" in root:
        shards = _of_pattern(root, lists)
    elif root.name.lower().endswith((TAR_SUFFIX, *COMPRESSED)):
        shards = _of_files(root, [root], lists)
    elif can_list(root):
        shards = _of_folder(root, lists)
    else:
        raise UserError(
            f"{root}: a web server does not say what lies on it; name a shard, or several by a pattern such as "
            f"{root.parent}/set-train-{{0000..1023}}.tar, or a .beton file"
        )
    folder = _common_folder(shards)
    beside = lists.objects([folder / CLASS_NAMES, folder / INDEX_NAME])
    return RemoteSet(folder, shards, *beside)


class _Listings:
    """What lies in folders, each asked for once."""

    def __init__(self) -> None:
        self._known: dict[Url, Listing] = {}

    def of(self, folder: Url) -> Listing:
        if folder not in self._known:
            self._known[folder] = asked(lambda: list_folder(folder), folder)
        return self._known[folder]

    def tars(self, folder: Url) -> dict[Url, Object]:
        """The tar files in a folder, sorted."""
        objects = sorted(self.of(folder).objects.items())
        return {folder / name: known for name, known in objects if name.endswith(TAR_SUFFIX) and not is_left_out(name)}

    def objects(self, urls: Iterable[Url]) -> list[Object | None]:
        """What the store says of each; None where it says that there is none."""
        urls = list(urls)
        if can_list(urls[0]):
            return [self.of(url.parent).objects.get(url.name) for url in urls]
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            return list(pool.map(lambda url: asked(lambda: _look(url), url), urls))


def _look(url: Url) -> Object | None:
    try:
        return look_at(url)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _of_pattern(root: Url, lists: _Listings) -> list[RemoteShard]:
    urls = [Url(name) for name in expand(root)]
    if packed := [url for url in urls if url.name.lower().endswith(COMPRESSED)]:
        raise _compressed(packed[0])
    if others := [url for url in urls if url.suffix != TAR_SUFFIX]:
        raise UserError(f"{others[0]}, which {root} names, is no tar file; shards are called NAME{TAR_SUFFIX}")
    return _of_files(root, urls, lists)


def _of_files(root: Url, urls: list[Url], lists: _Listings) -> list[RemoteShard]:
    if urls[0].name.lower().endswith(COMPRESSED):
        raise _compressed(urls[0])
    found = dict(zip(urls, lists.objects(urls), strict=True))
    if missing := [url for url, known in found.items() if known is None]:
        if len(urls) > 1:
            raise MissingDataError(f"{missing[0]} is missing: {len(missing):,} of the {len(urls):,} shards of {root}")
        others = [url.name for url in lists.tars(root.parent)] if can_list(root) else []
        raise MissingDataError(f"data root {root} does not exist{nearest(root.name, others)}")
    shards = [
        RemoteShard(url, split_by_name(url) or SPLIT_FOLDERS.get(url.parent.name, ""), known)
        for url, known in found.items() if known is not None
    ]  # fmt: skip
    if can_list(root) and not any(shard.split == "val" for shard in shards):
        shards += _validation_beside(urls[0].parent, root, lists)
    return of_splits(shards, root)


def _validation_beside(folder: Url, root: Url, lists: _Listings) -> list[RemoteShard]:
    """The shards in `folder` whose names are as those of `root`, of validation."""
    head = split_of(root.name.partition("{")[0])
    if head is None or head[0] != "train":
        return []
    found = []
    for url, known in lists.tars(folder).items():
        split = split_of(url.name)
        if split and split[0] == "val" and split[1].startswith(head[1]):
            found.append(RemoteShard(url, "val", known))
    return found


def _of_folder(root: Url, lists: _Listings) -> list[RemoteShard]:
    here = lists.of(root)
    in_splits = [name for name in SPLIT_FOLDERS if name in here.folders and lists.tars(root / name)]
    if in_splits:
        if {"val", "validation"} <= set(in_splits):
            raise UserError(f"{root} has shards in val and in validation; rename one of the two folders")
        if "train" not in in_splits:
            raise UserError(f"{root / in_splits[0]} has tar shards, and {root / 'train'} has none")
        return [
            RemoteShard(url, SPLIT_FOLDERS[name], known)
            for name in in_splits for url, known in lists.tars(root / name).items()
        ]  # fmt: skip
    tars = lists.tars(root)
    if not tars:
        raise _no_shards(root, here, lists)
    return of_splits([RemoteShard(url, split_by_name(url), known) for url, known in tars.items()], root)


def _no_shards(root: Url, here: Listing, lists: _Listings) -> UserError:
    if packed := [name for name in here.objects if name.lower().endswith(COMPRESSED)]:
        return _compressed(root / packed[0])
    looked_into = [here, *(lists.of(root / name) for name in here.folders[:_FOLDERS_LOOKED_INTO])]
    if any(name.endswith(PARQUET_SUFFIX) for listing in looked_into for name in listing.objects):
        return is_parquet(root)
    if here.folders or any(map(is_image, here.objects)):
        return MissingDataError(
            f"{root} has no tar shards (it has {', '.join([*here.folders, *here.objects][:3])}); images one by one are "
            "not read from an address: moco-dist data pack FOLDER OUT.beton makes a file that can lie there"
        )
    if root.key and not here.objects:
        return MissingDataError(f"{root}: nothing lies there{nearest(root.name, lists.of(root.parent).folders)}")
    return MissingDataError(f"{root} has no tar shards")


def _compressed(url: Url) -> UserError:
    return UserError(
        f"{url} is compressed, so that no image in it can be read alone; download it, and moco-dist data pack FOLDER "
        "OUT.beton makes a file in which it can"
    )


def _common_folder(shards: list[RemoteShard]) -> Url:
    store = shards[0].path.store
    if any(shard.path.store != store for shard in shards):
        raise UserError(f"the shards of a data set lie in one bucket or server, not in {store} and others")
    folder = os.path.commonpath([f"/{shard.path.parent.key}" for shard in shards]).strip("/")
    return store / folder if folder else store
