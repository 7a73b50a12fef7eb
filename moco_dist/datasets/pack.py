"""`moco-dist data pack`: a data set's images in one .beton file, for the loader `ffcv`."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from moco_dist.data.beton import JPEG, PACKED_SUFFIX, RAW, BetonWriter
from moco_dist.data.decode import decode_image
from moco_dist.data.images import ImageError, ImageFolder
from moco_dist.data.sources import bytes_reader, find_splits
from moco_dist.data.storage import raise_if_storage_failed
from moco_dist.datasets.compressed import decompressed, find_compressed
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import UserError, file_error

CHUNK = 256  # images read and encoded between two writes


class Packed(NamedTuple):
    """An image as it is stored; `data` is empty for one that cannot be read, with the reason."""

    mode: int
    width: int
    height: int
    data: bytes | memoryview
    problem: str = ""


def pack(source: Path, out: Path, max_side: int | None = None, quality: int = 90, raw_share: float = 0.0) -> Path:
    """Write SOURCE's training and validation images to `out`, which appears complete or not at all.

    JPEGs are copied as they are; only what is larger than `max_side`, or no plain JPEG, is encoded anew. Files that
    cannot be read are left out and listed in OUT.unreadable.txt.

    Args:
        source: SOURCE/train and SOURCE/val, a folder of images alone, or tar shards, which may be compressed.
        out: file to make, called *.beton.
        max_side: larger images are made smaller, to this longer side in pixels.
        quality: of JPEGs that are encoded anew, 1 to 100.
        raw_share: share of images stored as pixels: 4 to 5 times as large, and no decoding.

    Returns:
        `out`.

    Raises:
        UserError: the source has no readable images, or `out` cannot be written.
    """
    if out.suffix != PACKED_SUFFIX:
        raise UserError(f"{out} is no name for a packed file; did you mean {out.with_suffix(PACKED_SUFFIX)}?")
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another name")
    if source.suffix == PACKED_SUFFIX:
        raise UserError(f"{source} is packed already; what is packed is a folder or tar shards")
    with contextlib.ExitStack() as stack:
        if archives := find_compressed(source):
            source = stack.enter_context(decompressed(source, archives, out))
        return _pack(find_splits(source), source, out, max_side, quality, raw_share)


def _pack(
    splits: dict[str, ImageFolder], source: Path, out: Path, max_side: int | None, quality: int, raw_share: float
) -> Path:
    total, unreadable = sum(len(folder.paths) for folder in splits.values()), []
    with (
        _appearing(out) as file,
        BetonWriter(file, total) as writer,
        Told(f"packing {out.name}", total, "images", World()) as told,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for split, folder in splits.items():
            read = bytes_reader(folder)
            as_raw = np.random.default_rng(0).random(len(folder.paths)) < raw_share
            for start in range(0, len(folder.paths), CHUNK):
                chunk = range(start, min(start + CHUNK, len(folder.paths)))
                encoded = pool.map(lambda i: _encode(read, i, max_side, quality, bool(as_raw[i])), chunk)  # noqa: B023
                for i, image in zip(chunk, encoded, strict=True):
                    if image.problem:
                        unreadable.append(image.problem)
                    else:
                        writer.add(f"{split}/{folder.paths[i]}", int(folder.labels[i]), *image[:4])
                told.add(len(chunk))
        if len(unreadable) == total:
            raise UserError(f"none of the {total} images of {source} can be read; {unreadable[-1]}")
    note = ""
    if unreadable:
        listed = out.with_name(f"{out.name}.unreadable.txt")
        listed.write_text("\n".join(unreadable) + "\n", "utf-8", "surrogateescape")
        note = f"; {len(unreadable)} unreadable, see {listed}"
    print(f"{out} is ready: {total - len(unreadable):,} images, {out.stat().st_size / 2**30:.2f} GiB{note}")
    return out


def _encode(
    read: Callable[[int], tuple[bytes | bytearray, str]], i: int, max_side: int | None, quality: int, as_raw: bool
) -> Packed:
    try:
        data, name = read(i)
        if not as_raw:
            with contextlib.suppress(ValueError):  # what is damaged or no JPEG goes the way of PIL
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
                if colours in ("YCbCr", "Gray") and (max_side is None or max(int(width), int(height)) <= max_side):
                    simplejpeg.decode_jpeg(data, "RGB")
                    return Packed(JPEG, int(width), int(height), memoryview(data))
        image = decode_image(memoryview(data), name)
    except ImageError as error:
        raise_if_storage_failed(error)
        return Packed(JPEG, 0, 0, b"", str(error))
    if max_side and max(image.size) > max_side:
        scale = max_side / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    if as_raw:
        return Packed(RAW, *image.size, image.tobytes())
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Packed(JPEG, *image.size, file.getbuffer())


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[BinaryIO]:
    """A hidden file, which becomes `out` at the end, and is removed if anything goes wrong."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(out)
    except OSError as error:
        raise file_error(f"cannot write {out}: {error.strerror or error}", error) from error
    finally:
        partial.unlink(missing_ok=True)
