"""One living process writes into a run's folder."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.files import is_held
from moco_dist.run.folder import RunFolder

LOST_HOST_SECONDS = 120.0  # an NFS server keeps the locks of a host that is gone for its lease, 90 s by default


@contextlib.contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Rank 0 holds RUN/.lock for the length of a `with`. The kernel lets go of it however the process ends.

    By `lockf`: what `flock` takes would be held by forked loader workers too, which may outlive a killed rank.
    A file system that has no locks is warned of, and used. A holder on another host may have lost its power, and its
    file server not know it yet: that one is waited for.

    Raises:
        UserError: another living process holds it, or the folder cannot be written.
    """
    if not world.is_main:
        yield
        return
    path = RunFolder(run_dir).lock
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error
    with file:
        _take(file, run_dir)
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield


def _take(file: TextIO, run_dir: Path) -> None:
    host, deadline, is_told = socket.gethostname(), time.monotonic() + LOST_HOST_SECONDS, False
    while True:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not is_held(error):
                why = str(error.strerror).lower()
                return _say(f"warning: {run_dir} is on a file system without locks ({why}): nothing keeps a second run "
                            "from writing into it")  # fmt: skip
        file.seek(0)
        holder = file.read().strip()
        if holder.endswith(f" on host {host}") or time.monotonic() > deadline:
            raise UserError(f"run.dir {run_dir} is in use by {holder}; give another --run.dir")
        if not is_told:
            _say(f"note: run.dir {run_dir} is in use by {holder}; waiting up to {LOST_HOST_SECONDS:g} s, in case that "
                 "host is gone")  # fmt: skip
        is_told = True
        time.sleep(1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
