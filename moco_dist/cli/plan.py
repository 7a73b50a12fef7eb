"""`moco-dist plan`."""

import argparse
from pathlib import Path

from moco_dist.cli.arguments import Parser, require_positive
from moco_dist.cli.configured import config_or_help
from moco_dist.config.pretrain import PretrainConfig, size_problems
from moco_dist.errors import UserError


def main(words: list[str]) -> int:
    """What a pre-training will need and take, before it is started."""
    parser = Parser(
        "moco-dist plan", usage="moco-dist plan [CONFIG.yaml ...] [options] [--section.key VALUE]",
        description="Memory, bytes, decode rate, hours and scaling of a pre-training, each with its source.",
        epilog="Settings of the config may be given as for pretrain: see moco-dist pretrain --help.",
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, default=1, help="hosts")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="ranks on each of them")
    parser.add_argument("--gpu", help="use what was measured on hardware with this in its name, e.g. h100")
    parser.add_argument("--link-gigabit-per-second", type=float, metavar="RATE",
                        help="of each host's network, all its cards together")  # fmt: skip
    parser.add_argument("--num-images", type=int, help="in the data set, where data.root is not on this machine")
    parser.add_argument("--calibrate", action="store_true",
                        help="measure on this machine for a minute first; under torchrun also the network")  # fmt: skip
    parser.add_argument("--measurements", type=Path, metavar="DIR",
                        help="where calibrations are kept, and results of benchmarks/loader.py; "
                        "default: ~/.cache/moco_dist, and a checkout's benchmarks/results")  # fmt: skip
    args, rest = parser.parse_own(words)
    require_positive(args, "nodes", "gpus_per_node", "link_gigabit_per_second", "num_images")
    config = config_or_help("plan", PretrainConfig, rest)
    assert config is not None  # argparse has answered --help
    world_size = args.nodes * args.gpus_per_node
    if problems := size_problems(config, world_size):
        raise UserError("\n".join(problems))
    return _plan(config, world_size, args)


def _plan(config: PretrainConfig, world_size: int, args: argparse.Namespace) -> int:
    from moco_dist.distributed.collectives import process_group
    from moco_dist.distributed.world import World, world_from_env
    from moco_dist.planning import measurements, table
    from moco_dist.planning.arithmetic import sizes
    from moco_dist.provenance import hardware, package_versions

    world = world_from_env(config.run.device) if args.calibrate else World()
    where = [args.measurements] if args.measurements else measurements.folders()
    if args.calibrate:
        from moco_dist.planning.calibrate import calibrate

        here = hardware(world.device)
        gpu = args.gpu or here
        if gpu.lower() not in here.lower():
            raise UserError(f"this machine has {here}, not {gpu}; run --calibrate on one that has it")
        with process_group(world):
            measured = calibrate(config, world_size, world)
        if not world.is_main:
            return 0
        print("kept:", measurements.write(measured, package_versions(), "moco-dist plan --calibrate", where[0]))
        args.gpu = gpu
    inputs = table.Inputs(
        config, sizes(config, world_size, args.gpus_per_node), args.gpu, args.link_gigabit_per_second,
        _num_images(config, args.num_images), measurements.read(where), measurements.benchmark_of_loader(where, config),
        ", ".join(map(str, where)),
    )  # fmt: skip
    print(f"{config.model.arch}, {config.data.image_size} px, {config.optim.global_batch_size} samples a step on "
          f"{args.nodes} host(s) x {args.gpus_per_node}\n")  # fmt: skip
    print(table.text(table.plan(inputs)))
    return 0


def _num_images(config: PretrainConfig, given: int | None) -> tuple[int, str] | None:
    from moco_dist.data.images import subset
    from moco_dist.data.sources import find_images

    if given is not None:
        return given, "--num-images"
    try:
        return len(subset(find_images(config.data.root, "train"), config.data.max_samples).paths), "found in data.root"
    except UserError:
        return None
