"""`moco-dist pretrain`."""

import sys

from moco_dist.cli.configured import config_or_help
from moco_dist.config.pretrain import PretrainConfig, size_problems
from moco_dist.errors import UserError


def main(words: list[str]) -> int:
    """Pre-train an encoder by MoCo v2."""
    config = config_or_help("pretrain", PretrainConfig, words)
    if config is None:
        return 0

    # torch and everything that needs it: imported once the flags are known to be right.
    from moco_dist import train
    from moco_dist.distributed.collectives import process_group
    from moco_dist.distributed.heartbeat import Heartbeat
    from moco_dist.distributed.world import world_from_env
    from moco_dist.doctor import machine
    from moco_dist.run.lock import locked
    from moco_dist.tracking import Tracker

    world = world_from_env(config.run.device)
    if problems := size_problems(config, world.world_size):
        raise UserError("\n".join(problems))
    if world.local_rank == 0:
        for finding in machine.check(config, world.local_world_size, world.world_size):
            if finding.level == "error":
                print(f"[rank {world.rank}] warning: {finding.about}: {finding.text}", file=sys.stderr, flush=True)
    with (
        process_group(world, alone_too=config.engine.kind == "deepspeed"),
        Heartbeat(world, config.run.peer_timeout_seconds),
        locked(config.run.dir, world),
        Tracker.for_pretraining(config, world) as tracker,
    ):
        last = train.pretrain(config, world, tracker)
    if world.is_main:
        print(f"done: {last}")
    return 0
