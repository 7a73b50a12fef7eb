"""A rank that does nothing but meet the others and stay: for what happens to ranks, without a training."""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

from moco_dist.cli import main as command
from moco_dist.errors import InUseError

TIMEOUT_SECONDS = 3.0


def happen(what: str, folder: Path) -> None:
    """What becomes of this rank once all have met."""
    if what == "in use":
        raise InUseError("the folder is in use")
    if what == "bug":
        raise KeyError("nobody has foreseen this")
    if what == "abort":  # as NCCL's watchdog: in a thread, in the midst of a collective that does not return
        threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
    while what != "end" and not (folder / "end").exists():  # a collective of NCCL that waits for the others
        time.sleep(0.05)


def stay(what: str, folder: Path) -> int:
    """The length of a command, which loads torch when it has begun."""
    import torch.distributed as dist

    from moco_dist.distributed.collectives import barrier, process_group
    from moco_dist.distributed.heartbeat import Heartbeat
    from moco_dist.distributed.world import world_from_env

    if what.startswith("in use") or what == "bug":
        dist.destroy_process_group = lambda: time.sleep(3600)  # NCCL's, while the others sit in a collective
    world = world_from_env("cpu")
    with process_group(world), Heartbeat(world, TIMEOUT_SECONDS):
        barrier(world)
        (folder / f"met_{world.rank}").write_text(str(os.getpid()))
        happen(what, folder)
    return 0


if __name__ == "__main__":
    own = dict(enumerate(sys.argv[2:]))[int(os.environ["RANK"])]
    command._dispatch = lambda argv: stay(own, Path(sys.argv[1]))
    sys.exit(command.main([]))
