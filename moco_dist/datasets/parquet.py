"""Images in parquet files, as the Hugging Face hub keeps them: read forwards, once, to be packed.

A row of a parquet file cannot be read alone: its row group, about 100 images, is read and decoded with it. So parquet
is no data root. Columns are found by their types, and labels and order are what the files say. pyarrow, the extra
`parquet`, is imported where it is used.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from moco_dist.config.address import Url
from moco_dist.data.images import NO_CLASS, ImageError, ImageFolder
from moco_dist.data.layout import require_distinct
from moco_dist.data.names import Names
from moco_dist.data.remote.store import cannot_ask
from moco_dist.data.remote.window import WindowFile
from moco_dist.datasets.parquet_columns import Columns, distinct, find_columns
from moco_dist.datasets.parquet_files import ParquetFile
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import UserError, file_error, nearest

BUFFER_BYTES = 2**22  # read at once: what is held of a row group does not depend on its size
ASKED_AT_ONCE = 16  # files whose labels are read

Label = int | str | None
Read = Callable[[int], tuple[bytes, str]]


class _Rows(NamedTuple):
    """What a file says of its images: of each a label and the last part of a path, "" where it has none."""

    labels: list[Label]
    names: list[str]


def parquet_splits(
    files: list[ParquetFile], image_column: str | None, label_column: str | None, block: int
) -> dict[str, tuple[ImageFolder, Read]]:
    """The images of parquet files, by split: which there are, in the order of the rows, and a function that reads one.

    Args:
        files: what `find_parquet` has found.
        image_column: the name of a column; None: found by its type.
        label_column: the same.
        block: rows that are read at a time. They are asked for in any order within a block, and else forwards.

    Raises:
        UserError: pyarrow is not installed, a file is damaged, encrypted or of another schema than the first, no column
            or several may be meant, or a label has no name.
        InfrastructureError: a disk or a store fails.
    """
    with _opened(files[0]) as first:
        columns = find_columns(files[0].path, first.schema_arrow, image_column, label_column)
    print(columns.describe(), flush=True)
    rows = []
    with (
        Told(f"reading the labels of {files[0].path.parent}", len(files), "files", World()) as told,
        ThreadPoolExecutor(ASKED_AT_ONCE) as pool,
    ):
        for found in pool.map(lambda file: _rows(file, files[0], columns), files):
            rows.append(found)
            told.add()
    name_of, number_of = _classes(rows, files, columns)
    splits = {}
    for split in ("train", "val"):
        own = [(file, of_file) for file, of_file in zip(files, rows, strict=True) if (file.split or "train") == split]
        if not any(of_file.labels for _, of_file in own):
            continue
        labels = [number_of(label) for _, of_file in own for label in of_file.labels]
        names = [name for _, of_file in own for name in of_file.names]
        paths = _paths([name_of.get(label, "") for label in labels], names)
        folder = ImageFolder(
            files[0].path.parent, Names.of(paths), np.array(labels, np.int64), tuple(name_of.values())
        )  # fmt: skip
        counts = [len(of_file.labels) for _, of_file in own]
        splits[split] = folder, _Reader([file for file, _ in own], counts, columns.image_bytes, block).read
    if "train" not in splits:
        raise UserError(f"no image found in {files[0].path.parent}: its parquet files have no rows of training")
    return splits


def _rows(file: ParquetFile, first: ParquetFile, columns: Columns) -> _Rows:
    labels, names = list[Label](), list[str]()
    with _opened(file) as opened:
        if file is not first:
            columns.require_same(file.path, opened.schema_arrow, first.path)
        count = opened.metadata.num_rows
        if wanted := columns.beside_images:
            for batch in opened.iter_batches(2**16, columns=wanted):
                labels += columns.labels_of(batch, file.path, len(labels))
                names += columns.names_of(batch)
        else:
            labels, names = [None] * count, [""] * count
    return _Rows(labels, names)


def _classes(
    rows: list[_Rows], files: list[ParquetFile], columns: Columns
) -> tuple[dict[int, str], Callable[[Label], int]]:
    """The name of each class by its number, and a function from a label to the number."""
    if columns.class_names:
        name_of = dict(enumerate(columns.class_names))
    else:
        found: dict[str, set[Label]] = {"train": set(), "val": set()}
        for file, of_file in zip(files, rows, strict=True):
            found[file.split or "train"].update(of_file.labels)
        known = sorted(found["train"] - {None}, key=lambda label: (str(type(label)), label))
        if alone := sorted(map(str, found["val"] - found["train"] - {None})):
            hint = nearest(alone[0], map(str, known))
            raise UserError(f"validation has a class {alone[0]} that training lacks{hint}")
        if known and isinstance(known[0], str):
            require_distinct(files[0].path.parent, [str(label) for label in known])
            number = {label: i for i, label in enumerate(known)}
            texts = dict(enumerate(distinct([str(label) for label in known])))
            return texts, lambda label: NO_CLASS if label is None else number[label]
        width = len(str(known[-1])) if known else 0
        name_of = {int(label): f"{label:0{width}d}" for label in known}  # type: ignore[arg-type]
    return name_of, lambda label: NO_CLASS if label is None else int(label)


def _paths(classes: list[str], names: list[str]) -> list[str]:
    """CLASS/NAME of each image; with the number of its row in front where names are missing or are there twice."""
    paths = [f"{folder}/{name}" if folder else name for folder, name in zip(classes, names, strict=True)]
    if all(names) and len(set(paths)) == len(paths):
        return paths
    names = [f"{row:08d}_{name}" if name else f"{row:08d}.jpg" for row, name in enumerate(names)]
    return [f"{folder}/{name}" if folder else name for folder, name in zip(classes, names, strict=True)]


class _Reader:
    """Reads the images of a split, block by block: rows of a block are in memory, and no others."""

    def __init__(self, files: list[ParquetFile], counts: list[int], column: str, block: int) -> None:
        self._files, self._column, self._block_rows = files, column, block
        self._first = np.cumsum([0, *counts])
        self._lock = threading.Lock()
        self._rows: Iterator[Any] = iter(())
        self._block: list[Any] = []
        self._start = self._next = -1

    def read(self, i: int) -> tuple[bytes, str]:
        """The bytes of an image, and what it is called in errors.

        Raises:
            ImageError: the row has none.
            UserError: its file is damaged.
        """
        start = i - i % self._block_rows
        with self._lock:
            if start != self._start:
                if start != self._next:
                    self._rows = self._rows_from(start)
                self._block, self._start = [], -1  # the last ones can go
                self._block = list(itertools.islice(self._rows, self._block_rows))
                self._start, self._next = start, start + self._block_rows
            value = self._block[i - start]
        number = self._file_of(i)
        name = f"row {i - self._first[number]} of {self._files[number].path}"
        if not value.is_valid:
            raise ImageError(f"cannot read image {name}: it has no bytes (null)")
        return value.as_py(), name

    def _file_of(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, "right")) - 1

    def _rows_from(self, start: int) -> Iterator[Any]:
        """The values of the column from a row on."""
        for number in range(self._file_of(start), len(self._files)):
            with _opened(self._files[number]) as opened:
                skipped, groups = max(0, start - int(self._first[number])), list(range(opened.num_row_groups))
                while groups and skipped >= opened.metadata.row_group(groups[0]).num_rows:
                    skipped -= opened.metadata.row_group(groups.pop(0)).num_rows
                for batch in opened.iter_batches(self._block_rows, groups, [self._column]) if groups else ():
                    values = batch.column(0)
                    if "." in self._column:
                        (values,) = values.flatten()
                    yield from values[min(skipped, len(values)) :]
                    skipped = max(0, skipped - len(values))


@contextlib.contextmanager
def _opened(file: ParquetFile) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile, whose errors are told in one line within a `with`."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet is read by pyarrow: pip install 'moco_dist[parquet]'") from None
    source = WindowFile(file.path, file.known) if isinstance(file.path, Url) else file.path  # type: ignore[arg-type]
    try:
        with parquet.ParquetFile(
            source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            if isinstance(file.path, Url):
                raise cannot_ask(file.path, error) from error
            raise file_error(f"{file.path} cannot be read: {(error.strerror or str(error)).lower()}", error) from error
        said = " ".join(str(error).split())
        if "crypt" in said:
            raise UserError(f"{file.path} is encrypted; write it anew without encryption") from error
        raise UserError(f"{file.path} is no parquet file, is damaged or was cut off: {said[:150]}") from error
