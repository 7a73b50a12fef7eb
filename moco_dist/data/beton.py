"""FFCV's file format (.beton, version 2): many images in one file, as JPEG or raw pixels.

Source: ffcv 1.0.2 (github.com/libffcv/ffcv), `types.py`, `fields/` and `writer.py`. Read and written here without the
package, which is needed neither for packing nor for loading: its writer hangs when a worker dies and encodes every
JPEG anew, its loader hangs on an exception, compiles for up to a minute in every process, and takes all of a
process's torch threads. FFCV's own loader reads these files, and files that FFCV wrote are read here.

A file is: header; descriptions of the fields; one record a sample; the data, in pages that no image crosses unless
it is larger than one; the table of (sample, place, size) of all data.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from moco_dist.config.address import Url
from moco_dist.data.names import Names
from moco_dist.errors import UserError, file_error

VERSION = 2
PACKED_SUFFIX = ".beton"  # of a file's name
PAGE_BYTES = 8 * 2**20  # FFCV's default
JPEG, RAW = 0, 1

_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table_at", "<u8")],
    align=True,
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
_TABLE = np.dtype([("sample", "<u8"), ("at", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")])
_BYTES = np.dtype([("at", "<u8"), ("size", "<u8")])
# type_id to record; the fields that FFCV's users write beside these are refused.
_FLOAT_ID, _INT_ID, _IMAGE_ID, _BYTES_ID = range(4)
_RECORDS = {_FLOAT_ID: np.dtype("<f8"), _INT_ID: np.dtype("<i8"), _IMAGE_ID: _IMAGE, _BYTES_ID: _BYTES}
_OUR_FIELDS = {"image": _IMAGE_ID, "label": _INT_ID, "path": _BYTES_ID}


class Content(Protocol):
    """The bytes of a file, of which parts are read as uint8 arrays."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Beton:
    """An open file.

    Attributes:
        content: uint8 (bytes of the file,), a map into the page cache: processes of a machine share it.
        mode: (N,) JPEG or RAW.
        width, height: (N,) pixels.
        start, size: (N,) where in `content` an image is, in bytes.
        labels: (N,) int64, the class's number; -1: none.
        names: of the samples, SPLIT/CLASS/FILE; made up for files that have none.
    """

    content: Content
    mode: NDArray[np.uint8]
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: Names

    def problem(self, row: int) -> str:
        """Why an image cannot be what the file says of it; empty where it can. No pixel is read or allocated."""
        mode, start, size = int(self.mode[row]), int(self.start[row]), int(self.size[row])
        width, height = int(self.width[row]), int(self.height[row])
        if not (start >= 0 and 0 < size <= len(self.content) - start):
            return "the file has no such place"
        if mode not in (JPEG, RAW):
            return f"it is stored in an unknown way ({mode})"
        if mode == RAW and size != width * height * 3:
            return f"{size:,} bytes are not the pixels of {width} x {height}"
        return ""


def read_beton(path: Path) -> Beton:
    """Open a file.

    Raises:
        UserError: it is missing, no .beton file, incomplete, or without images and labels.
    """
    try:
        return parse_beton(np.memmap(path, np.uint8, mode="r"), path)
    except OSError as error:
        raise file_error(f"{path} cannot be read: {(error.strerror or str(error)).lower()}", error) from error
    except UserError:
        raise
    except ValueError as error:  # numpy's for an empty file
        raise _not_whole(path, "it is empty") from error


def parse_beton(content: Content, path: Path | Url) -> Beton:
    """What is in a file, of which everything but the images is read.

    Raises:
        UserError: it is no .beton file, incomplete, or without images and labels.
    """
    try:
        header = _rows(content, 0, 1, _HEADER, "header")[0]
        if header["version"] != VERSION:
            raise _Problem(f"version {header['version']}, not {VERSION}")
        at, count = _HEADER.itemsize, int(header["num_fields"])
        fields = _rows(content, at, count, _FIELD, "fields")
        kinds = [int(field["type_id"]) for field in fields]
        names = [field["name"].tobytes().rstrip(b"\0").decode("utf-8", "replace") for field in fields]
        if other := next((name for name, kind in zip(names, kinds, strict=True) if kind not in _RECORDS), None):
            raise _Problem(f"its field {other!r} is of a kind that is not read here")
        if _IMAGE_ID not in kinds or not ("label" in names or _INT_ID in kinds):
            raise _Problem(f"its fields are {', '.join(names) or 'none'}")
        record = np.dtype([("", _RECORDS[kind]) for kind in kinds], align=True)
        at += count * _FIELD.itemsize
        records = _rows(content, at, int(header["num_samples"]), record, "records")
        at = int(header["table_at"])
        table = _rows(content, at, max(0, len(content) - at) // _TABLE.itemsize, _TABLE, "table")
        if (len(content) - at) % _TABLE.itemsize:
            raise _Problem("it ends within its table")
        if not len(records) or not len(table):
            raise _Problem(f"it has no {'table' if len(records) else 'image'}")
        columns = {name: records[f"f{i}"] for i, name in enumerate(names)}
        images = columns[names[kinds.index(_IMAGE_ID)]]
        size = _sizes(images["at"], table)
        labels = np.array(columns["label"] if "label" in columns else columns[names[kinds.index(_INT_ID)]])
        texts = columns.get("path")
        if texts is None:
            names_found = Names.of([f"train/{label}/{i:08d}" for i, label in enumerate(labels.tolist())])
        else:
            ends = texts["at"] + texts["size"]  # may be too large for a number: so each part is looked at too
            if max(part.max() for part in (texts["at"], texts["size"], ends)) > len(content):
                raise _Problem("it ends before its names")
            if texts["size"].sum() > len(content):
                raise _Problem("its names are longer than it is")
            first, end = int(texts["at"].min()), int(ends.max())
            starts, ends = ((edge - first).astype(np.int64) for edge in (texts["at"], ends))
            names_found = _names(content[first:end], starts, ends)
    except _Problem as error:
        raise _not_whole(path, str(error)) from error
    except UserError:  # of what reads the content
        raise
    except (ValueError, KeyError, IndexError) as error:  # numpy's, of numbers that do not fit each other
        raise _not_whole(path, "its header is damaged") from error
    width, height, start = (images[name].astype(np.int64) for name in ("width", "height", "at"))
    return Beton(content, np.array(images["mode"]), width, height, start, size, labels, names_found)


def _sizes(starts: NDArray[np.uint64], table: NDArray[np.void]) -> NDArray[np.int64]:
    """(N,) bytes of what begins at `starts`; -1 where the table knows nothing there."""
    at, size = table["at"], table["size"]
    if len(at) >= len(starts) and np.array_equal(at[: len(starts)], starts):  # written one after the other
        return size[: len(starts)].astype(np.int64)
    order = np.argsort(at, kind="stable")
    entry = np.minimum(np.searchsorted(at[order], starts), len(table) - 1)
    return np.where(at[order][entry] == starts, size[order][entry].astype(np.int64), -1)


def _names(part: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Names:
    """Those at these places of a part of a file, in memory: a map of what is cut off later would end the process."""
    if len(part) > 2 * (ends - starts).sum():  # between the images, where FFCV writes them
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        return Names.of([bytes(part[start:end]).decode("utf-8", "surrogateescape") for start, end in places])
    return Names(np.array(part), ends, None, starts)


class _Problem(ValueError):
    """What is wrong with a file, in a few words."""


def _rows(content: Content, at: int, count: int, kind: np.dtype, what: str) -> NDArray:
    """`count` rows of a table at a place of the file.

    Raises:
        _Problem: the file ends before the last of them.
    """
    if at + count * kind.itemsize > len(content):
        raise _Problem(f"it ends before its {what}")
    return content[at : at + count * kind.itemsize].view(kind)


def _not_whole(path: Path | Url, problem: str) -> UserError:
    return UserError(
        f"{path} is not a whole file of images and labels: {problem}; moco-dist data pack SOURCE OUT.beton writes one"
    )


class BetonWriter:
    """Writes a file, image by image. Use it in a `with`: a file that was not closed has no valid header.

    Args:
        file: to write to, opened in binary.
        max_samples: how many records to leave room for.
    """

    def __init__(self, file: BinaryIO, max_samples: int) -> None:
        self._record = np.dtype([("", _RECORDS[kind]) for kind in _OUR_FIELDS.values()], align=True)
        self._max_samples = max_samples
        self._records_at = _HEADER.itemsize + len(_OUR_FIELDS) * _FIELD.itemsize
        self._file, self._page = file, -(-(self._records_at + max_samples * self._record.itemsize) // PAGE_BYTES)
        self._at = self._page * PAGE_BYTES
        self._table: list[tuple[int, int, int]] = []
        self._images: list[tuple[int, int, int, int]] = []
        self._labels: list[int] = []
        self._names: list[bytes] = []

    def add(self, name: str, label: int, mode: int, width: int, height: int, data: bytes | memoryview) -> int:
        """Append an image: `data` is a JPEG file or width x height x 3 pixels. Returns where it lies."""
        size = len(data)
        if self._at // PAGE_BYTES != (self._at + size - 1) // PAGE_BYTES and self._at % PAGE_BYTES:
            self._at = (self._at // PAGE_BYTES + 1) * PAGE_BYTES
        self._file.seek(self._at)
        self._file.write(data)
        self.take(name, label, mode, width, height, at := self._at, size)
        return at

    def take(self, name: str, label: int, mode: int, width: int, height: int, at: int, size: int) -> None:
        """Take as the next image what the file has already, `size` bytes at `at`, where `add` has put them."""
        self._table.append((len(self._images), at, size))
        self._images.append((mode, width, height, at))
        self._labels.append(label)
        self._names.append(name.encode("utf-8", "surrogateescape"))
        self._at = at + size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        records = np.zeros(len(self._images), self._record)
        records["f0"] = np.array(self._images, _IMAGE)
        records["f1"] = self._labels
        sizes = np.fromiter(map(len, self._names), np.uint64, len(self._names))
        names = np.zeros(len(sizes), _TABLE)
        names["sample"], names["at"], names["size"] = np.arange(len(sizes)), self._at + np.cumsum(sizes) - sizes, sizes
        records["f2"]["at"], records["f2"]["size"] = names["at"], sizes
        self._file.seek(self._at)
        self._file.write(b"".join(self._names))
        self._at += int(sizes.sum())
        self._file.write(np.array(self._table, _TABLE).tobytes() + names.tobytes())
        self._file.seek(self._records_at)
        self._file.write(records.tobytes().ljust(self._max_samples * self._record.itemsize, b"\0"))
        fields = np.zeros(len(_OUR_FIELDS), _FIELD)
        for field, (name, kind) in zip(fields, _OUR_FIELDS.items(), strict=True):
            field["type_id"] = kind
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        header = np.array([(VERSION, len(_OUR_FIELDS), PAGE_BYTES, len(records), self._at)], _HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes())
