"""`moco-dist data`."""

import argparse
from pathlib import Path

from moco_dist.errors import UserError, nearest

DATASETS = ("shapes", "fashion-mnist", "cifar10", "imagefolder")


def main(words: list[str]) -> int:
    """Get or check a data set."""
    parser = argparse.ArgumentParser("moco-dist data", description="get or check a data set")
    prepare = parser.add_subparsers(dest="action", required=True).add_parser("prepare")
    prepare.add_argument("name", help=f"one of {', '.join(DATASETS)}")
    prepare.add_argument("--out", type=Path, required=True, help="folder to write: OUT/train and OUT/val")
    prepare.add_argument("--source", type=Path, help="fashion-mnist: folder of its .gz files; imagefolder: the images")
    args = parser.parse_args(words)
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
