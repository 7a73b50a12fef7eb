"""`moco-dist data pack`: a data set's images in one .beton file, for the loader `ffcv`."""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from moco_dist.config.address import Url
from moco_dist.data.beton import JPEG, PACKED_SUFFIX, RAW, BetonWriter
from moco_dist.data.decode import decode_image
from moco_dist.data.images import ImageError, ImageFolder
from moco_dist.data.sources import bytes_reader, find_splits
from moco_dist.data.storage import raise_if_storage_failed
from moco_dist.datasets.compressed import decompressed, find_compressed
from moco_dist.datasets.parquet import parquet_splits
from moco_dist.datasets.parquet_files import find_parquet
from moco_dist.datasets.unfinished import Chunk, Unfinished
from moco_dist.distributed.stop import StopRequest
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import Preempted, UserError, file_error
from moco_dist.files import key_of
from moco_dist.provenance import __version__

CHUNK = 256  # images read and encoded at a time; a stop waits for them
MOST_PIXELS = 65_500  # a side: of a JPEG that libjpeg writes


class Source(NamedTuple):
    """What is packed.

    Attributes:
        splits: the images of `train`, and of `val` where there is one.
        readers: of each split, a function from an image's number to its bytes and its name.
        files: that hold many images each, and what they were like; empty where each image is a file.
    """

    splits: dict[str, ImageFolder]
    readers: dict[str, Callable[[int], tuple[bytes | bytearray, str]]]
    files: dict[str, list[int | str]]


class Packed(NamedTuple):
    """An image as it is stored; `data` is empty for one that cannot be read, with the reason."""

    mode: int
    width: int
    height: int
    data: bytes | memoryview
    problem: str = ""


def pack(
    source: Path | Url, out: Path, max_side: int | None = None, quality: int = 90, raw_share: float = 0.0,
    image_column: str | None = None, label_column: str | None = None,
) -> Path:  # fmt: skip
    """Write SOURCE's training and validation images to `out`, which appears complete or not at all.

    A call that is stopped keeps what it has packed, hidden beside `out`; the same call goes on from there, and its file
    is the same, byte for byte, as one made in one go. What has changed in the source since is packed anew.

    JPEGs are copied as they are; only what is larger than `max_side`, or no plain JPEG, is encoded anew. Files that
    cannot be read are left out and listed in OUT.unreadable.txt.

    Args:
        source: SOURCE/train and SOURCE/val, a folder of images alone, tar shards, which may be compressed, or parquet
            files; or the address of plain shards or of parquet.
        out: file to make, called *.beton.
        max_side: larger images are made smaller, to this longer side in pixels.
        quality: of JPEGs that are encoded anew, 1 to 100.
        raw_share: share of images stored as pixels: 4 to 5 times as large, and no decoding.
        image_column: of parquet, where several are images by their types.
        label_column: of parquet, where none is called `label` or several have classes.

    Returns:
        `out`.

    Raises:
        UserError: the source has no readable images, or `out` cannot be written.
        InUseError: another process is packing `out`.
        Preempted: SIGTERM, SIGHUP or Ctrl-C.
    """
    if out.suffix != PACKED_SUFFIX:
        raise UserError(f"{out} is no name for a packed file; did you mean {out.with_suffix(PACKED_SUFFIX)}?")
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another name")
    if source.suffix == PACKED_SUFFIX:
        raise UserError(f"{source} is packed already; what is packed is a folder, tar shards or parquet")
    with contextlib.ExitStack() as stack:
        if parquet := find_parquet(source):
            found = parquet_splits(parquet, image_column, label_column, CHUNK)
            files: dict[str, list[int | str]] = {str(file.path): list(file.known) for file in parquet}
            splits = {split: folder for split, (folder, _) in found.items()}
            content = Source(splits, {split: read for split, (_, read) in found.items()}, files)
        elif image_column or label_column:
            raise UserError(f"--image-column and --label-column are for parquet, and {source} has none")
        else:
            plain, files = source, {}
            if isinstance(source, Path) and (given := find_compressed(source)):
                files = {str(file): [facts.st_size, facts.st_mtime_ns] for file in given for facts in [file.stat()]}
                plain = stack.enter_context(decompressed(source, given, out))
            splits = find_splits(plain)
            if not files:
                places = [folder.places for folder in splits.values() if folder.places]
                files = {str(file): [*facts] for of in places for file, facts in zip(of.files, of.facts, strict=True)}
            content = Source(splits, {split: bytes_reader(folder) for split, folder in splits.items()}, files)
        recipe = {"source": str(source.absolute()), "max_side": max_side, "quality": quality, "raw_share": raw_share,
                  "columns": [image_column, label_column]}  # fmt: skip
        return _pack(content, recipe, source, out)


def _pack(content: Source, recipe: dict[str, Any], source: Path | Url, out: Path) -> Path:
    recipe |= {
        "versions": [__version__, PIL.__version__], "chunk": CHUNK,
        "files": sorted([file, *facts] for file, facts in content.files.items()),
        "splits": {name: [folder.list_hash, key_of(folder.labels.tolist())] for name, folder in content.splits.items()},
    }  # fmt: skip
    total = sum(len(folder.paths) for folder in content.splits.values())
    note = ""
    with (
        StopRequest(math.inf, World()) as stop,
        _unfinished(out, recipe) as unfinished,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        work = _Work(content, pool, recipe["max_side"], recipe["quality"], recipe["raw_share"])
        with BetonWriter(unfinished.file, total) as writer:
            unreadable = _write(work, writer, unfinished, stop, out, total)
            if len(unreadable) == total:
                raise UserError(f"none of the {total} images of {source} can be read; {unreadable[-1]}")
        if unreadable:
            listed = out.with_name(f"{out.name}.unreadable.txt")
            listed.write_text("\n".join(unreadable) + "\n", "utf-8", "surrogateescape")
            note = f"; {len(unreadable)} unreadable, see {listed}"
        unfinished.become(out)
    print(f"{out} is ready: {total - len(unreadable):,} images, {out.stat().st_size / 2**30:.2f} GiB{note}")
    return out


def _write(
    work: "_Work", writer: BetonWriter, unfinished: Unfinished, stop: StopRequest, out: Path, total: int
) -> list[str]:
    """Write all images that an earlier call has not written; returns why others cannot be read."""
    before = list(itertools.takewhile(lambda pair: work.is_as_then(*pair), enumerate(unfinished.before)))
    unfinished.go_on_after(len(before))
    unreadable, done = list[str](), 0
    for number, chunk in before:
        work.take(number, chunk, writer)
        unreadable += [problem for _, problem in chunk.unreadable]
        done += len(work.chunks[number][1])
    if done:
        print(f"{out} goes on after {done:,} of {total:,} images, which an earlier call has packed")
    elif unfinished.before or unfinished.is_of_another:
        print(f"{out} begins anew: what an earlier call has packed is of other images or settings")
    with Told(f"packing {out.name}", total, "images", World(), done) as told:
        for number in range(len(before), len(work.chunks)):
            if stop.is_asked:
                unfinished.keep()
                raise Preempted(f"{done:,} of {total:,} images are packed")
            unfinished.add(chunk := work.pack(number, writer))
            unreadable += [problem for _, problem in chunk.unreadable]
            done += len(work.chunks[number][1])
            told.add(len(work.chunks[number][1]))
    return unreadable


class _Work:
    """The images of all splits in chunks, and how they are stored.

    Attributes:
        chunks: split and numbers of the images of each.
    """

    def __init__(
        self, content: Source, pool: ThreadPoolExecutor, max_side: int | None, quality: int, raw_share: float
    ) -> None:
        self.chunks = [
            (split, range(start, min(start + CHUNK, len(folder.paths))))
            for split, folder in content.splits.items() for start in range(0, len(folder.paths), CHUNK)
        ]  # fmt: skip
        self._content, self._pool, self._max_side, self._quality = content, pool, max_side, quality
        self._as_raw = {
            split: np.random.default_rng(0).random(len(folder.paths)) < raw_share
            for split, folder in content.splits.items()
        }

    def pack(self, number: int, writer: BetonWriter) -> Chunk:
        """Read, encode and write the images of a chunk."""
        split, rows = self.chunks[number]
        chunk = Chunk(self._facts(number), [], [])
        for i, image in zip(rows, self._pool.map(lambda i: self._encoded(split, i), rows), strict=True):
            if image.problem:
                chunk.unreadable.append((i, image.problem))
            else:
                at = writer.add(*self._name_and_label(split, i), *image[:4])
                chunk.stored.append((i, *image[:3], at, len(image.data)))
        return chunk

    def take(self, number: int, chunk: Chunk, writer: BetonWriter) -> None:
        """Take a chunk's images as they are written already."""
        for i, *stored in chunk.stored:
            writer.take(*self._name_and_label(self.chunks[number][0], i), *stored)

    def is_as_then(self, number: int, chunk: Chunk) -> bool:
        """Whether a chunk's files are as they were when it was packed, and those that nobody could read still so."""
        split = self.chunks[number][0]
        return chunk.facts == self._facts(number) and all(self._encoded(split, i).problem for i, _ in chunk.unreadable)

    def _name_and_label(self, split: str, i: int) -> tuple[str, int]:
        folder = self._content.splits[split]
        return f"{split}/{folder.paths[i]}", int(folder.labels[i])

    def _encoded(self, split: str, i: int) -> "Packed":
        return _encode(self._content.readers[split], i, self._max_side, self._quality, bool(self._as_raw[split][i]))

    def _facts(self, number: int) -> str:
        """What the files of a chunk are like; "" for files of many images, of which the recipe says it."""
        split, rows = self.chunks[number]
        folder = self._content.splits[split]
        return "" if self._content.files else key_of(
            list(self._pool.map(lambda i: _size_and_time(folder.root / folder.paths[i]), rows))
        )  # fmt: skip


def _size_and_time(path: Path) -> list[int | None]:
    try:
        facts = path.stat()
    except OSError as error:
        return [error.errno]
    return [facts.st_size, facts.st_mtime_ns]


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
    if max(image.size) > MOST_PIXELS:
        sides = " x ".join(f"{side:,}" for side in image.size)
        problem = f"cannot pack image {name}: {sides} pixels, and {MOST_PIXELS:,} a side are the most; give --max-side"
        return Packed(JPEG, 0, 0, b"", problem)
    if as_raw:
        return Packed(RAW, *image.size, image.tobytes())
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Packed(JPEG, *image.size, file.getbuffer())


@contextlib.contextmanager
def _unfinished(out: Path, recipe: dict[str, Any]) -> Iterator[Unfinished]:
    """What becomes `out`; where anything goes wrong, what is written is kept for the next call."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Unfinished(out, recipe)
        try:
            yield unfinished
        finally:
            unfinished.close()
    except OSError as error:
        raise file_error(f"cannot write {out}: {error.strerror or error}", error) from error
