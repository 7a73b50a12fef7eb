"""A sqlite database of MLflow: set up by one process at a time, and made anew where a set-up has failed half-way."""

import contextlib
import fcntl
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from moco_dist.files import is_held

Opened = TypeVar("Opened")
SQLITE = "sqlite:///"
HEADER = b"SQLite format 3\0"
# What SQLAlchemy and alembic say where an earlier set-up or update has stopped in the middle, or two ran at once.
HALF_MADE = ("already exists", "duplicate column", "no such table", "no such column", "expected to match one row",
             "is malformed")  # fmt: skip


def file_of(uri: str) -> Path | None:
    """The file of a sqlite URI; None for any other URI, and for a database in memory."""
    path = uri.removeprefix(SQLITE).partition("?")[0]
    return Path(path) if uri.startswith(SQLITE) and path not in ("", ":memory:") else None


def open_alone(path: Path, open_it: Callable[[], Opened]) -> Opened:
    """What `open_it` returns; no other process that calls this opens a database in the same folder meanwhile.

    MLflow makes and updates its tables when it first opens a database, by dozens of steps that two processes must
    not take at once. What an interrupted or doubled set-up has left can never be opened again: without a run in it,
    it is set aside, and a new one is made.

    Raises:
        RuntimeError: the database is broken and has runs, or is no database; the text says what to do.
        Exception: any that `open_it` raises.
    """
    with _folder_locked(path.parent):
        if path.is_file() and _beginning(path) not in (HEADER, b""):
            raise RuntimeError(f"{path} is not a sqlite database; {way_out(path)}")
        try:
            return open_it()
        except Exception as error:  # SQLAlchemy, alembic and mlflow each have their own
            if not any(sign in str(error) for sign in HALF_MADE):
                raise
            if _has_runs(path):
                raise RuntimeError(f"{path} is broken, by a set-up or an update that was interrupted or that two "
                                   f"programs did at once; {way_out(path)}") from error  # fmt: skip
        aside = path.with_name(f"{path.name}.broken")
        path.replace(aside)
        tqdm.write(f"note: the set-up of {path} was interrupted, or two programs did it at once; it has no runs, so it "
                   f"is renamed to {aside.name}, and a new one is made", file=sys.stderr)  # fmt: skip
        return open_it()


def has_run(path: Path, run_id: str) -> bool:
    """Whether the database in the file `path` knows an MLflow run."""
    try:
        return _is_there(path, "runs", "run_uuid = ?", run_id)
    except sqlite3.Error:
        return False


def _has_runs(path: Path) -> bool:
    """Whether there may be something to lose: a run, or an experiment beside the one that MLflow makes itself."""
    try:
        return any(
            _is_there(path, f"{prefix}runs") or _is_there(path, f"{prefix}experiments", "experiment_id != 0")
            for prefix in ("", "_alembic_tmp_")  # where an update keeps a table while it changes it
        )
    except sqlite3.Error:
        return True


def _is_there(path: Path, table: str, condition: str = "1", *values: str) -> bool:
    """Whether a table is there and has such a row; the database is only read."""
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchall():
            return False
        return bool(database.execute(f"SELECT 1 FROM {table} WHERE {condition} LIMIT 1", values).fetchall())


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(HEADER))


def way_out(path: Path) -> str:
    """What to do about a database that cannot be used any more: the runs keep their journals."""
    return (f"move it away (mv {path} {path}.broken), then `moco-dist sync RUN` for each run tells a new one all that "
            "the run's folder keeps")  # fmt: skip


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here for `folder`. A file system without locks is used without one."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if is_held(error):
                raise
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a loader worker that was forked meanwhile has the descriptor too
        os.close(fd)
