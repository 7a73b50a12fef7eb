"""The images that a run goes over. Their list is kept, so that another list is seen before a step is done over it."""

import gzip
from collections.abc import Sequence

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from moco_dist.data.images import ImageFolder
from moco_dist.files import write_whole
from moco_dist.provenance import hash_of_list
from moco_dist.run.folder import RunFolder

NAMED = 2  # images that a message names


class ImageList(TypedDict):
    """What a checkpoint says of the list: how many images, and `hash_of_list` of their paths."""

    count: int
    hash: str


def listed(images: ImageFolder) -> ImageList:
    """The list of `images` as a checkpoint keeps it. It does not say where the images lie: they may be moved."""
    return {"count": len(images.paths), "hash": hash_of_list(images.paths)}


def keep_list(images: ImageFolder, run: RunFolder) -> None:
    """Write the paths themselves beside the checkpoints, once for each list; 7 bytes an image for ImageNet.

    Raises:
        OSError: they cannot be written.
    """
    path = run.images(hash_of_list(images.paths))
    if not path.is_file():
        content = "\n".join(images.paths).encode("utf-8", "surrogateescape")
        write_whole(path, gzip.compress(content, compresslevel=1, mtime=0))


def difference(images: ImageFolder, before: ImageList, run: RunFolder) -> str:
    """How `images` differ from the list of a checkpoint, in a few words; "" where they are the same."""
    now = listed(images)
    if now == before:
        return ""
    try:
        kept = gzip.decompress(run.images(before["hash"]).read_bytes()).decode("utf-8", "surrogateescape").split("\n")
    except (OSError, EOFError, ValueError):  # the list was lost or damaged: nothing depends on it
        return f"{before['count']:,} images before, {now['count']:,} now"
    old, new = set(kept), set(images.paths)
    came, went = [path for path in images.paths if path not in old], [path for path in kept if path not in new]
    if not came and not went:
        return "the same images in another order"
    return f"{len(came):,} came{_some(came)}, {len(went):,} went{_some(went)}"


def _some(paths: Sequence[str]) -> str:
    more = ", ..." if len(paths) > NAMED else ""
    return f" ({', '.join(paths[:NAMED])}{more})" if paths else ""
