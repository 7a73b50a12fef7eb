"""One living process writes into a run's folder."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.files import is_held


@contextlib.contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Rank 0 holds RUN/.lock for the length of a `with`. The kernel lets go of it however the process ends.

    By `lockf`: what `flock` takes would be held by forked loader workers too, which may outlive a killed rank.
    A file system that has no locks is warned of, and used.

    Raises:
        UserError: another living process holds it, or the folder cannot be written.
    """
    if not world.is_main:
        yield
        return
    path = run_dir / ".lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if is_held(error):
                file.seek(0)
                holder = file.read().strip()
                raise UserError(f"run.dir {run_dir} is in use by {holder}; give another --run.dir") from None
            print(f"warning: {run_dir} is on a file system without locks ({str(error.strerror).lower()}): nothing "
                  "keeps a second run from writing into it", file=sys.stderr)  # fmt: skip
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield
