"""`moco-dist data`."""

import argparse
from pathlib import Path

from moco_dist.errors import UserError, nearest

DATASETS = ("shapes", "fashion-mnist", "cifar10", "imagefolder")


def main(words: list[str]) -> int:
    """Get or check a data set."""
    parser = argparse.ArgumentParser("moco-dist data", description="get or check a data set")
    actions = parser.add_subparsers(dest="action", required=True)
    pack = actions.add_parser("pack", help="write a data set into one file, for data.loader ffcv")
    pack.add_argument("source", type=Path, help="SOURCE/train and SOURCE/val, or a folder of images")
    pack.add_argument("out", type=Path, help="file to write, NAME.beton")
    pack.add_argument("--max-side", type=int, help="make larger images smaller, to this longer side in pixels")
    pack.add_argument("--quality", type=int, default=90, help="of JPEGs that are encoded anew (default 90)")
    pack.add_argument("--raw-share", type=float, default=0.0, help="share of images stored as pixels (default 0)")
    prepare = actions.add_parser("prepare")
    prepare.add_argument("name", help=f"one of {', '.join(DATASETS)}")
    prepare.add_argument("--out", type=Path, required=True, help="folder to write: OUT/train and OUT/val")
    prepare.add_argument("--source", type=Path, help="fashion-mnist: folder of its .gz files; imagefolder: the images")
    args = parser.parse_args(words)
    if args.action == "pack":
        return _pack(args)
    if args.name not in DATASETS:
        raise UserError(f"unknown data set {args.name!r}; {', '.join(DATASETS)} are{nearest(args.name, DATASETS)}")

    from moco_dist.data import prepare as data_sets

    if args.name == "shapes":
        data_sets.prepare_shapes(args.out)
    elif args.name == "fashion-mnist":
        data_sets.prepare_fashion_mnist(args.out, args.source)
    elif args.name == "cifar10":
        data_sets.prepare_cifar10(args.out)
    elif args.source is None:
        raise UserError("data prepare imagefolder needs --source, the folder of class folders to check")
    else:
        data_sets.prepare_imagefolder(args.out, args.source)
    return 0


def _pack(args: argparse.Namespace) -> int:
    problems = [
        f"--{name} {value} is not between {low} and {high}"
        for name, value, low, high in (
            ("max-side", args.max_side or 1, 1, 65_535),
            ("quality", args.quality, 1, 100),
            ("raw-share", args.raw_share, 0, 1),
        )
        if not low <= value <= high
    ]
    if problems:
        raise UserError("\n".join(problems))

    from moco_dist.data.pack import pack

    pack(args.source, args.out, args.max_side, args.quality, args.raw_share)
    return 0
