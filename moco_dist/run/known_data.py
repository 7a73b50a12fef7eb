"""Data that is missing and was there before: its disk is not mounted, and nobody has mistaken a path."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from moco_dist.config.address import Url
from moco_dist.data.images import MissingDataError
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError, UserError
from moco_dist.files import write_whole
from moco_dist.run import checkpoint
from moco_dist.run.folder import RunFolder


@contextlib.contextmanager
def missed_if_gone(root: Path | Url, was_there: bool, where: Path) -> Iterator[None]:
    """Within it data of `root` is looked for; what is missing although it `was_there` is no mistake.

    Args:
        root: the data set's folder or file.
        was_there: what is known of it.
        where: the run's folder, or the file of weights, for the message.

    Raises:
        InfrastructureError: it was there, and is gone.
    """
    try:
        yield
    except MissingDataError as error:
        if not was_there:
            raise
        raise InfrastructureError(
            f"{error}; it was there when {where} was worked with before: is its disk mounted?"
        ) from error


def has_trained_on(root: Path | Url, run_dir: Path) -> bool:
    """Whether the run has a checkpoint, and had its images from `root` when it was last started."""
    with contextlib.suppress(UserError):
        trained_on = RunFolder(run_dir).settings().data.root.absolute()
        return bool(checkpoint.complete_checkpoints(run_dir)) and trained_on == root.absolute()
    return False


def has_evaluated_on(root: Path | Url, record: Path) -> bool:
    """Whether an evaluation has found its data there; `record` is a file of `remember`."""
    return str(root.absolute()) in _roots(record)


def remember(root: Path | Url, record: Path, world: World) -> None:
    """That an evaluation has found its data in `root`; by rank 0, where it can be written."""
    if world.is_main and not has_evaluated_on(root, record):
        with contextlib.suppress(OSError):  # no record is a condition of anything
            lines = [*_roots(record), str(root.absolute())]
            write_whole(record, "\n".join(lines).encode("utf-8", "surrogateescape"))


def _roots(record: Path) -> list[str]:
    try:
        return record.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError:
        return []
