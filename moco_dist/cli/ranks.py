"""What every rank of a command that trains or evaluates does before its work, and undoes after it."""

import contextlib
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moco_dist.cli.imports import quick_imports
from moco_dist.config.evaluate import DetectConfig, EvalConfig
from moco_dist.config.pretrain import PretrainConfig, require_sizes

if TYPE_CHECKING:
    from moco_dist.distributed.world import World

PEER_TIMEOUT_SECONDS = 60.0  # for an evaluation; a pre-training has run.peer_timeout_seconds


@contextlib.contextmanager
def ranks(config: PretrainConfig | EvalConfig | DetectConfig) -> Iterator["World"]:
    """The world, with its process group and heartbeat, for the length of a `with`; a pre-training also locks RUN.

    Raises:
        UserError: the sizes do not fit the ranks, the ranks cannot be a group, or another process holds RUN.
        UnreachableError: the other ranks cannot be reached.
        InfrastructureError: NCCL cannot use this machine's devices or network.
    """
    _allow_open_files()
    with quick_imports():  # once the flags are known to be right
        from moco_dist.distributed.collectives import process_group
        from moco_dist.distributed.heartbeat import Heartbeat
        from moco_dist.distributed.world import world_from_env
        from moco_dist.run.lock import locked

    if not isinstance(config, PretrainConfig):
        world = world_from_env(config.device)
        with process_group(world), Heartbeat(world, PEER_TIMEOUT_SECONDS):
            yield world
        return
    world = world_from_env(config.run.device)
    require_sizes(config, world.world_size)
    _warn_of_machine(config, world)
    with (
        process_group(world, alone_too=config.engine.kind == "deepspeed"),
        Heartbeat(world, config.run.peer_timeout_seconds),
        locked(config.run.dir, world),
    ):
        yield world


def _allow_open_files() -> None:
    """Raise the soft limit on open files, usually 1,024, to the hard one: rank 0 of 252 ranks needs more than that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a kernel that gives less than its own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _warn_of_machine(config: PretrainConfig, world: "World") -> None:
    """One line on stderr for each thing that this host lacks; the first rank of each host looks."""
    from moco_dist.doctor import machine

    if world.local_rank == 0:
        for finding in machine.check(config, world.local_world_size, world.world_size):
            if finding.level == "error":
                print(f"[rank {world.rank}] warning: {finding.about}: {finding.text}", file=sys.stderr, flush=True)
