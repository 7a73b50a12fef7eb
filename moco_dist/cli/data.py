"""`moco-dist data`."""

import argparse
from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.cli.configured import config_or_help
from moco_dist.config.address import Url
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.errors import UserError, nearest

DATASETS = ("shapes", "fashion-mnist", "cifar10", "imagenette", "imagenet", "imagefolder")
HAS_SOURCE = "fashion-mnist: folder of its .gz files; imagenette: its .tgz; imagenet, imagefolder: the folder"


def main(words: list[str]) -> int:
    """Get or check a data set."""
    parser = Parser("moco-dist data", description="get or check a data set")
    actions = parser.add_subparsers(dest="action", required=True)
    pack = actions.add_parser("pack", help="write a data set into one file, for data.loader ffcv")
    pack.add_argument("source", type=Url, help="SOURCE/train and SOURCE/val, a folder of images, tar shards, parquet")
    pack.add_argument("out", type=Path, help="file to write, NAME.beton")
    pack.add_argument("--max-side", type=int, help="make larger images smaller, to this longer side in pixels")
    pack.add_argument("--quality", type=int, default=90, help="of JPEGs that are encoded anew (default 90)")
    pack.add_argument("--raw-share", type=float, default=0.0, help="share of images stored as pixels (default 0)")
    pack.add_argument("--image-column", help="of parquet, where several are images by their types")
    pack.add_argument("--label-column", help="of parquet, where none is called label or several have classes")
    verify = actions.add_parser("verify", help="decode every image, and count them")
    verify.add_argument("root", type=Url, help="ROOT/train and ROOT/val, a folder of images, tar shards, FILE.beton")
    index = actions.add_parser("index", help="write the index of tar shards, to lie beside them in an object store")
    index.add_argument("root", type=Url, help="the tar shards, on a disk or at an address")
    index.add_argument("--out", type=Path, required=True, help="file to write, to be copied to FOLDER/moco_dist.idx")
    views = actions.add_parser(
        "views", help="a contact sheet of pairs of views, as the encoders see them",
        usage="moco-dist data views [CONFIG.yaml ...] --out FILE.png [--count COUNT] [--section.key VALUE ...]",
    )  # fmt: skip
    views.add_argument("--out", type=Path, required=True, help="PNG to write")
    views.add_argument("--count", type=int, default=16, help="pairs of views (default 16)")
    prepare = actions.add_parser("prepare", help="get a data set, whole or not at all")
    prepare.add_argument("name", help=f"one of {', '.join(DATASETS)}")
    prepare.add_argument("--out", type=Path, required=True, help="folder to write: OUT/train and OUT/val")
    prepare.add_argument("--source", type=Path, help=HAS_SOURCE)
    prepare.add_argument("--from", dest="kind", default="tars", help="imagenet: tars or folder (default tars)")
    args, rest = parser.parse_known_args(words)
    if args.action == "views":
        return _views(args, rest)
    if rest:
        actions.choices[args.action].error(f"unrecognized arguments: {rest[0]}")
    if args.action == "pack":
        return _pack(args)
    if args.action == "verify":
        return _verify(args.root)
    if args.action == "index":
        return _index(args.root, args.out)
    if args.name not in DATASETS:
        raise UserError(f"unknown data set {args.name!r}; {', '.join(DATASETS)} are{nearest(args.name, DATASETS)}")

    if args.kind not in ("tars", "folder"):
        raise UserError(f"--from {args.kind!r} is not tars or folder{nearest(args.kind, ('tars', 'folder'))}")

    if args.source is not None and args.name in ("shapes", "cifar10"):
        raise UserError(f"--source is not for {args.name}; it is for {HAS_SOURCE}")
    if args.kind != "tars" and args.name != "imagenet":
        raise UserError(f"--from is for imagenet, not for {args.name}")

    from moco_dist.datasets import prepare as data_sets

    if args.name == "shapes":
        data_sets.prepare_shapes(args.out)
    elif args.name == "imagenette":
        data_sets.prepare_imagenette(args.out, args.source)
    elif args.name == "fashion-mnist":
        data_sets.prepare_fashion_mnist(args.out, args.source)
    elif args.name == "cifar10":
        data_sets.prepare_cifar10(args.out)
    elif args.source is None:
        raise UserError(f"data prepare {args.name} needs --source, the folder of its {_source_of(args)}")
    elif args.name == "imagenet":
        data_sets.prepare_imagenet(args.out, args.source, args.kind)
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

    from moco_dist.datasets.pack import pack

    pack(
        args.source, args.out, args.max_side, args.quality, args.raw_share, args.image_column, args.label_column
    )  # fmt: skip
    return 0


def _source_of(args: argparse.Namespace) -> str:
    return "three archives" if (args.name, args.kind) == ("imagenet", "tars") else "class folders"


def _index(root: Path | Url, out: Path) -> int:
    from moco_dist.data.remote.index import INDEX_NAME, write_index

    count = write_index(root, out)
    print(f"{out} is ready: {count:,} images; as {INDEX_NAME} beside the shards it saves the reading of headers")
    return 0


def _verify(root: Path | Url) -> int:
    from moco_dist.datasets.prepare import verify

    if problems := verify(root):
        raise UserError("\n".join([*problems, f"{root} has {len(problems)} problem(s)"]))
    return 0


def _views(args: argparse.Namespace, rest: list[str]) -> int:
    if args.count < 1:
        raise UserError(f"--count {args.count} is not a number of pairs; 1 or more is")
    config = config_or_help("data views --out FILE.png", PretrainConfig, rest)
    if config is None:
        return 0

    from moco_dist.report.contact_sheet import write_contact_sheet

    write_contact_sheet(config, args.count, args.out)
    print(f"wrote {args.out}")
    return 0
