"""The images that a run goes over. Their list is kept, so that another list is seen before a step is done over it."""

import gzip
import zlib
from collections.abc import Sequence
from typing import NotRequired  # pydantic needs this one before Python 3.12

from typing_extensions import TypedDict

from moco_dist.data.images import ImageFolder
from moco_dist.files import write_whole
from moco_dist.run.folder import RunFolder

NAMED = 2  # images that a message names


class ImageList(TypedDict):
    """What a checkpoint says of the list.

    Attributes:
        count: of images.
        hash: `hash_of_list` of their paths.
        content_hash: of labels and names alone, by which the same images in another format are known.
        class_names_hash: of the classes' names, or "".
    """

    count: int
    hash: str
    content_hash: NotRequired[str]
    class_names_hash: NotRequired[str]


def listed(images: ImageFolder) -> ImageList:
    """The list of `images` as a checkpoint keeps it. It does not say where the images lie: they may be moved."""
    return {
        "count": len(images.paths),
        "hash": images.list_hash,
        "content_hash": images.content_hash,
        "class_names_hash": images.class_names_hash,
    }


def keep_list(images: ImageFolder, run: RunFolder) -> None:
    """Write the paths themselves beside the checkpoints, once for each list; 7 bytes an image for ImageNet.

    Raises:
        OSError: they cannot be written.
    """
    path = run.images(images.list_hash)
    if not path.is_file():
        content = "\n".join(images.paths).encode("utf-8", "surrogateescape")
        write_whole(path, gzip.compress(content, compresslevel=1, mtime=0))


def difference(images: ImageFolder, before: ImageList, run: RunFolder) -> str:
    """How `images` differ from the list of a checkpoint, in a few words; "" where they are the same.

    They may be stored in another format: then names and labels count, and the classes' names where both have them.
    """
    if images.list_hash == before["hash"]:
        return ""
    classes = {images.class_names_hash, before.get("class_names_hash", "")} - {""}
    if len(classes) < 2 and images.content_hash == before.get("content_hash"):
        return ""
    kept = _kept(before, run)
    if kept is None:
        return f"{before['count']:,} images before, {len(images.paths):,} now"
    old, new = set(kept), set(images.paths)
    came, went = [path for path in images.paths if path not in old], [path for path in kept if path not in new]
    if not came and not went:
        return "the same images in another order"
    return f"{len(came):,} came{_some(came)}, {len(went):,} went{_some(went)}"


def are_gone(images: ImageFolder, before: ImageList, run: RunFolder) -> bool:
    """Whether none of the images of a checkpoint's list is among `images`; False where its paths are not known."""
    kept = _kept(before, run)
    return kept is not None and set(kept).isdisjoint(images.paths)


def _kept(before: ImageList, run: RunFolder) -> list[str] | None:
    """The paths of `keep_list`; None where they were lost or damaged: nothing depends on them."""
    try:
        return gzip.decompress(run.images(before["hash"]).read_bytes()).decode("utf-8", "surrogateescape").split("\n")
    except (OSError, EOFError, ValueError, zlib.error):
        return None


def _some(paths: Sequence[str]) -> str:
    more = ", ..." if len(paths) > NAMED else ""
    return f" ({', '.join(paths[:NAMED])}{more})" if paths else ""
