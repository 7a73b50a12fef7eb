"""Tar files for tests, of members given as (name, content)."""

import io
import os
import tarfile
import time


def write_tar(path, members, tar_format=tarfile.GNU_FORMAT):
    """`members`: (name, bytes) of files, or a TarInfo for what is none. Last changed a minute ago; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    os.utime(path, (time.time() - 60, time.time() - 60))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    """A link as a member."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def files_of(folder):
    """(relative name, content) of all image files below, sorted."""
    paths = sorted(path for path in folder.rglob("*.*") if path.is_file() and not path.name.startswith("."))
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in paths]


def with_labels(files, suffix="cls"):
    """As WebDataset has them: NAME.jpg without its class folder, and its number beside it."""
    classes = sorted({name.split("/")[0] for name, _ in files})
    members = []
    for name, content in files:
        folder, _, base = name.partition("/")
        number = classes.index(folder)
        label = f"{number}" if suffix == "cls" else f'{{"label": {number}, "width": 3}}'
        members += [(f"{base.rpartition('.')[0]}.{suffix}", label.encode()), (base, content)]
    return members
