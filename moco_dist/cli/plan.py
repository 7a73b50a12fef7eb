"""`moco-dist plan`."""

from pathlib import Path

from moco_dist.cli.arguments import Parser, require_positive
from moco_dist.cli.configured import config_or_help
from moco_dist.cli.imports import quick_imports
from moco_dist.config.pretrain import PretrainConfig, require_sizes


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
    parser.add_argument("--dry-run", action="store_true",
                        help="run one rank's step on tensors without memory, on any machine: does it work, and "
                        "what does it ask of its GPU")  # fmt: skip
    args, rest = parser.parse_own(words)
    require_positive(args, "nodes", "gpus_per_node", "link_gigabit_per_second", "num_images")
    config = config_or_help("plan", PretrainConfig, rest)
    assert config is not None  # argparse has answered --help
    require_sizes(config, args.nodes * args.gpus_per_node)

    with quick_imports():
        from moco_dist.method.build import settled

    config = settled(config)
    heading = (f"{config.model.arch}, {config.data.image_size} px, {config.optim.global_batch_size} samples a step on "
               f"{args.nodes} host(s) x {args.gpus_per_node}")  # fmt: skip
    if args.dry_run:
        from moco_dist.planning import dry_run

        found = dry_run.dry_run(config, args.nodes, args.gpus_per_node)
        print(f"{heading}: one rank's step works\n\n{dry_run.text(found)}")
        return 0

    from moco_dist.planning import calibrate, inputs, measurements, table

    folders = [args.measurements] if args.measurements else measurements.folders()
    if args.calibrate:
        kept = calibrate.calibrate_here(config, args.nodes * args.gpus_per_node, args.gpu, folders[0])
        if kept is None:
            return 0
        print("kept:", kept.path)
        args.gpu = args.gpu or kept.hardware
    planned = inputs.gather(
        config, args.nodes, args.gpus_per_node, args.gpu, args.link_gigabit_per_second, args.num_images, folders
    )
    print(f"{heading}\n")
    print(table.text(table.lines_of(planned)))
    return 0
