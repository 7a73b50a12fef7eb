"""What lies where in a tar file: the images in it, found by reading its headers, and their labels.

Headers are read by Python's `tarfile`, so GNU's and POSIX's long names are too. Of the content only labels are read.
"""

import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moco_dist.config.address import Url
from moco_dist.data.layout import is_image, is_left_out
from moco_dist.data.storage import open_file
from moco_dist.data.tar.layout import TAR_SUFFIX
from moco_dist.errors import UserError
from moco_dist.files import parsed_json

LABEL_SUFFIXES = (".cls", ".json")  # the first that is there counts
MOST_LABEL_BYTES = 2**20
_MAGIC = {
    b"\x1f\x8b": "gz",
    b"BZh": "bz2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"\x04\x22\x4d\x18": "lz4",
}
_LOOKED_AT = 2**20  # bytes behind the end of an archive, to see whether another one follows

Label = int | str | None


class ShardImages(NamedTuple):
    """The images of one shard, in its order.

    Attributes:
        names: N paths in the archive, with `/` between folders and no `./`.
        offset, size: (N,) int64, where their bytes lie in the shard.
        labels: N, what a .cls or .json beside an image says: a number, a class's name, or None where there is none.
    """

    names: list[str]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    labels: list[Label]


def read_shard(shard: Path) -> ShardImages:
    """The images of a tar file, and of tar files in it: an inner one's name is the folder, and so class, of its images.

    Of two members of one name the later counts, as when unpacking.

    Raises:
        UserError: it cannot be read, is compressed, damaged or cut off, or stores an image in a way that cannot be read
            in place (sparse, or as a link to another file).
    """
    try:
        with open_file(shard) as file:
            return read_open_shard(shard, file)
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {(error.strerror or str(error)).lower()}") from error


def read_open_shard(shard: Path | Url, file: BinaryIO) -> ShardImages:
    """`read_shard` of a file that is open already, or of what reads and seeks as one.

    Raises:
        UserError: see `read_shard`.
        OSError: the file's.
    """
    return _Reader(shard, file).read()


class _Reader:
    """Reads the headers of one shard, once."""

    def __init__(self, shard: Path | Url, file: BinaryIO) -> None:
        self._shard, self._file = shard, file
        self._size = file.seek(0, 2)
        self._images: dict[str, tuple[int, int]] = {}
        self._labels: dict[str, dict[str, Label]] = {suffix: {} for suffix in LABEL_SUFFIXES}  # by name without suffix

    def read(self) -> ShardImages:
        self._file.seek(0)
        start = self._file.read(8)
        if not start:
            raise UserError(f"{self._shard} is empty (0 bytes); was it downloaded whole?")
        if kind := next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), ""):
            raise UserError(
                f"{self._shard} is compressed ({kind}), so that no image in it can be read alone; rename it to "
                f"{self._shard.name}.{kind}, and moco-dist data pack FOLDER OUT.beton makes a file in which it can"
            )
        self._read_archive(0, self._size, "")
        places = np.array(list(self._images.values()), np.int64).reshape(-1, 2)
        labels = list(map(self._label, self._images))
        return ShardImages(list(self._images), places[:, 0].copy(), places[:, 1].copy(), labels)

    def _read_archive(self, start: int, end: int, folder: str) -> None:
        """The archive between two places of the shard; `folder`, with its `/`, is what its members lie in."""
        where = f"{self._shard}{f' ({folder[:-1]}.tar in it)' if folder else ''}"
        self._file.seek(start)
        inner: list[tuple[int, int, str]] = []
        try:
            tar = tarfile.TarFile(fileobj=self._file, encoding="utf-8", errors="surrogateescape")
            while tar.offset <= end and (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # they would be kept, all of them
                if member.offset >= end:
                    break
                if member.offset_data + (member.size if member.isreg() else 0) > end:
                    raise tarfile.ReadError("unexpected end of data")
                parts = _parts(member.name)
                if parts and not any(map(is_left_out, parts)):
                    inner += self._member(member, parts, folder)
            self._require_end(tar.offset, end)
        except tarfile.ReadError as error:
            raise UserError(f"{where} is no tar file, is damaged or was cut off: {error}") from error
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # of crafted headers
            raise UserError(f"{where} has a header that cannot be read ({error})") from error
        for place in inner:
            self._read_archive(*place)

    def _member(self, member: tarfile.TarInfo, parts: list[str], folder: str) -> list[tuple[int, int, str]]:
        """Take in a member; returns where it lies, and the folder that it is, if it is an archive itself."""
        name = "/".join(parts) if f"{parts[0]}/" == folder else folder + "/".join(parts)
        lower = name.lower()
        if is_image(name):
            if (place := self._place(member, name, folder)) is not None:
                self._images.pop(name, None)
                self._images[name] = place
        elif member.isreg() and not folder and lower.endswith(TAR_SUFFIX):
            return [(member.offset_data, member.offset_data + member.size, f"{name[: -len(TAR_SUFFIX)]}/")]
        elif member.isreg() and lower.endswith(LABEL_SUFFIXES) and member.size <= MOST_LABEL_BYTES:
            stem, _, suffix = name.rpartition(".")
            self._labels[f".{suffix.lower()}"][stem] = self._read_label(member, suffix.lower(), name)
        return []

    def _place(self, member: tarfile.TarInfo, name: str, folder: str) -> tuple[int, int] | None:
        """Where an image's bytes lie; None for a folder or device of such a name."""
        if member.issparse():
            raise UserError(f"{name} in {self._shard} is sparse (stored with holes); pack the shard without --sparse")
        if member.isreg():
            return member.offset_data, member.size
        if member.issym():
            raise UserError(
                f"{name} in {self._shard} is a link to {member.linkname}, with no image in it; "
                "tar --dereference stores the files themselves"
            )
        if member.islnk():
            target = "/".join(_parts(member.linkname))
            if folder + target not in self._images:
                raise UserError(f"{name} in {self._shard} is a second name of {member.linkname}, which is not in it")
            return self._images[folder + target]
        return None

    def _read_label(self, member: tarfile.TarInfo, suffix: str, name: str) -> Label:
        self._file.seek(member.offset_data)
        content = self._file.read(member.size)
        if suffix == "json":
            try:
                value = parsed_json(content)
            except ValueError:
                raise UserError(f"{name} in {self._shard} is not JSON") from None
            label = value.get("label") if isinstance(value, dict) else None
            if isinstance(label, bool) or not isinstance(label, int | str):
                return None
        else:
            label = content.decode("utf-8", "surrogateescape")
        text = str(label).strip()
        if re.fullmatch(r"-?\d{1,9}", text):
            return int(text) if int(text) >= 0 else None
        return text or None

    def _require_end(self, at: int, end: int) -> None:
        """That an archive has its end mark, and nothing behind it: what is damaged ends the reading of headers too."""
        self._file.seek(at)
        block = self._file.read(min(tarfile.BLOCKSIZE, max(0, end - at)))
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"it ends at byte {at:,} without an end mark")
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"there is no header at byte {at:,}")
        if self._file.read(min(_LOOKED_AT, max(0, end - at - tarfile.BLOCKSIZE))).strip(b"\0"):
            raise tarfile.ReadError(
                f"more follows its end mark at byte {at:,}, as where cat puts archives together; tar -A does it right"
            )

    def _label(self, name: str) -> Label:
        folder, slash, base = name.rpartition("/")
        # WebDataset's name of a sample ends at the first dot.
        for stem in (name.rpartition(".")[0], folder + slash + base.partition(".")[0]):
            for labels in self._labels.values():
                if (label := labels.get(stem)) is not None:
                    return label
        return None


def _parts(name: str) -> list[str]:
    """The folders of a member and its own name, without what leads out of the archive: nothing is unpacked."""
    return [part for part in name.split("/") if part not in ("", ".", "..")]
