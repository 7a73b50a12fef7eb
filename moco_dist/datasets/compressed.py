"""Compressed tar shards, of which no image can be read alone: decompressed beside what is made of them, and removed."""

import bz2
import contextlib
import gzip
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from moco_dist.data.layout import is_left_out
from moco_dist.data.tar.layout import COMPRESSED, SPLIT_FOLDERS, TAR_SUFFIX
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import UserError, file_error

_OPENERS = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".txz": lzma.open, ".bz2": bz2.open,
            ".tbz2": bz2.open, ".tbz": bz2.open}  # fmt: skip


def find_compressed(source: Path) -> list[Path]:
    """Compressed tar files: `source` itself, or those in a folder or in its train and val, if it has no plain one."""
    if source.is_file():
        return [source] if source.name.lower().endswith(COMPRESSED) else []
    folders = [folder for folder in (source, *(source / name for name in SPLIT_FOLDERS)) if folder.is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if not is_left_out(file.name)]
    if any(file.suffix == TAR_SUFFIX for file in files) or any(
        file.is_dir() and file.name not in SPLIT_FOLDERS for file in files
    ):
        return []
    return [file for file in files if file.name.lower().endswith(COMPRESSED) and file.is_file()]


@contextlib.contextmanager
def decompressed(source: Path, archives: list[Path], out: Path) -> Iterator[Path]:
    """A folder beside `out` with these files as plain tar files, for the length of a `with`.

    Raises:
        UserError: one is damaged, or compressed by what this Python does not have; or there is no space.
    """
    for archive in archives:
        if archive.suffix.lower() not in _OPENERS:
            raise UserError(f"{archive} is compressed by {archive.suffix[1:]}, which is not read here; unpack it to a "
                            f"plain {TAR_SUFFIX} file, which may be a data root as it is")  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent))
        told = stack.enter_context(Told("decompressing", len(archives), "shards", World()))
        for archive in archives:
            inside = archive.parent.relative_to(source) if source.is_dir() else Path()
            suffix = next(suffix for suffix in COMPRESSED if archive.name.lower().endswith(suffix))
            plain = Path(scratch) / inside / (archive.name[: -len(suffix)] + TAR_SUFFIX)
            plain.parent.mkdir(exist_ok=True)
            try:
                with _OPENERS[archive.suffix.lower()](archive) as packed, plain.open("wb") as file:
                    shutil.copyfileobj(packed, file, 2**20)
            except OSError as error:
                why = (error.strerror or str(error)).lower()
                raise file_error(f"{archive} cannot be decompressed: {why}", error) from error
            except (EOFError, lzma.LZMAError, zlib.error) as error:
                raise UserError(f"{archive} cannot be decompressed: {error}") from error
            told.add()
        yield Path(scratch) if source.is_dir() else next(Path(scratch).iterdir())
