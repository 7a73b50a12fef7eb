"""`moco-dist pretrain`."""

from pathlib import Path

from moco_dist.cli.configured import config_or_help
from moco_dist.cli.imports import quick_imports
from moco_dist.cli.ranks import ranks
from moco_dist.config.pretrain import PretrainConfig


def main(words: list[str]) -> int:
    """Pre-train an encoder by MoCo v2."""
    config = config_or_help("pretrain", PretrainConfig, words)
    if config is None:
        return 0
    last, is_main = trained(config)
    if is_main:
        print(f"done: {last}")
    return 0


def trained(config: PretrainConfig) -> tuple[Path, bool]:
    """Pre-train with the ranks that this process is among; the last checkpoint, and whether this is rank 0."""
    with quick_imports():
        from moco_dist import train
        from moco_dist.tracking import Tracker

    with ranks(config) as world, Tracker.for_pretraining(config, world) as tracker:
        return train.pretrain(config, world, tracker), world.is_main
