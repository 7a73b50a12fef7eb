"""One living process writes into a run's folder, and all ranks have the same one."""

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from moco_dist.distributed.collectives import gather_texts
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_IN_USE, InfrastructureError, InUseError, UserError, file_error
from moco_dist.files import is_held
from moco_dist.run.checkpoint import latest
from moco_dist.run.folder import RunFolder
from moco_dist.run.manifest import read_manifest

LOST_HOST_SECONDS = 120.0  # an NFS server keeps the locks of a host that is gone for its lease, 90 s by default
SEEN_SECONDS = 15.0  # a shared file system may show a new folder to some hosts a little later
WATCH_SECONDS = 2.0


@contextlib.contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Rank 0 holds RUN/.lock for the length of a `with`. The kernel lets go of it however the process ends.

    It is taken by `lockf`: forked loader workers, which may outlive a killed rank, would hold what `flock` takes too.
    A file system that has no locks is warned of, and used. A holder on another host may have lost its power while its
    file server does not know it yet, so such a holder is waited for.

    Where somebody removes RUN, it is made and locked again, and this process is told to stop as a scheduler tells it:
    what it has learned is saved there. Where another run has begun there before that, this process ends at once.

    Raises:
        InUseError: another living process holds it.
        UserError: the folder cannot be written (InfrastructureError where its disk is the reason), or it is not one
            folder for all ranks.
    """
    if not world.is_main:
        require_shared(run_dir, world)
        yield
        return
    run = RunFolder(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = run.lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise file_error(f"run.dir {run_dir} cannot be written: {error.strerror}", error) from error
    quit = threading.Event()
    with contextlib.ExitStack() as held:
        held.enter_context(file)
        _take(file, run_dir)
        _sign(file)
        require_shared(run_dir, world)
        watch = threading.Thread(target=_watch, args=(file, run, held, quit), name="lock", daemon=True)
        watch.start()
        try:
            yield
        finally:
            quit.set()
            watch.join()


def require_shared(run_dir: Path, world: World) -> None:
    """Look on every rank for a file that rank 0 has just written. Called by all ranks.

    Raises:
        UserError: on all ranks, where some do not see it: each host would keep a part of every checkpoint.
        InfrastructureError: the same, where all saw it when the newest checkpoint was written.
    """
    if world.world_size == 1:
        return
    run, token = RunFolder(run_dir), ""
    if world.is_main:
        with contextlib.suppress(OSError):  # the disk is full: then nothing is known
            run.checkpoints.mkdir(exist_ok=True)
            for left_over in run.checkpoints.glob(run.token("*").name):
                left_over.unlink()
            name = secrets.token_hex(8)
            run.token(name).touch()
            token = name
    token = gather_texts(token, world)[0]
    until, is_seen = time.monotonic() + SEEN_SECONDS, not token or run.token(token).exists()
    while not is_seen and time.monotonic() < until:
        time.sleep(0.2)
        is_seen = run.token(token).exists()
    was_shared = world.is_main and _was_shared(run_dir, world)
    hosts = [text.split() for text in gather_texts(f"{socket.gethostname()} {is_seen} {was_shared}", world)]
    if world.is_main and token:
        run.token(token).unlink(missing_ok=True)
    blind = [f"rank {rank} on host {host}" for rank, (host, seen, _) in enumerate(hosts) if seen == "False"]
    if blind:
        who = blind[0] + (f" and {len(blind) - 1} more" if len(blind) > 1 else "")
        text = (f"run.dir {run_dir} is not one folder for all ranks: {who} cannot see what rank 0 on host "
                f"{hosts[0][0]} writes there; it has to lie on a disk that all hosts share")  # fmt: skip
        if hosts[0][2] == "True":
            raise InfrastructureError(f"{text}, as it did when the newest checkpoint was written: is it mounted there?")
        raise UserError(text)


def _was_shared(run_dir: Path, world: World) -> bool:
    """Whether the newest checkpoint is of more ranks than one host has: then rank 0 has seen other hosts' files."""
    with contextlib.suppress(UserError, OSError):
        return read_manifest(latest(run_dir))["world_size"] > world.local_world_size
    return False


def _signature() -> str:
    return f"process {os.getpid()} on host {socket.gethostname()}"


def _sign(file: TextIO) -> None:
    file.truncate(0)
    file.write(_signature())
    file.flush()


def _watch(file: TextIO, run: RunFolder, held: contextlib.ExitStack, quit: threading.Event) -> None:
    """The thread that sees whether RUN/.lock is still the file that this process has locked."""
    is_told = False
    while not quit.wait(WATCH_SECONDS):
        try:
            if os.path.samestat(run.lock.stat(), os.fstat(file.fileno())):
                continue
        except FileNotFoundError:
            pass
        except OSError:  # a file server that does not answer has not removed anything
            continue
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            # The file stays open: to close it frees what this process has locked of it, by whatever name it was opened.
            file = held.enter_context(run.lock.open("a+", encoding="utf-8"))
        except OSError as error:
            if not is_told:
                why = (error.strerror or str(error)).lower()
                _say(f"warning: run.dir {run.root} was removed and cannot be made again: {why}; trying again")
            is_told = True
            continue
        is_told = False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if is_held(error):
                _say(f"error: run.dir {run.root} was removed or replaced, and another run is there; this one ends")
                os._exit(EXIT_IN_USE)
        file.seek(0)
        if file.read() == _signature():  # the file system numbers its files anew
            continue
        _sign(file)
        if run.config.is_file():
            _say(f"warning: {run.lock} was removed; it is locked again")
            continue
        _say(f"warning: run.dir {run.root} was removed; it is made again, and the run saves there and stops; what else "
             "was in it is lost")  # fmt: skip
        os.kill(os.getpid(), signal.SIGTERM)


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
            raise InUseError(f"run.dir {run_dir} is in use by {holder}; give another --run.dir")
        if not is_told:
            _say(f"note: run.dir {run_dir} is in use by {holder}; waiting up to {LOST_HOST_SECONDS:g} s, in case that "
                 "host is gone")  # fmt: skip
        is_told = True
        time.sleep(1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
