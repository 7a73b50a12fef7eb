"""`moco-dist features`."""

import shutil
from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.cli.imports import quick_imports
from moco_dist.cli.ranks import ranks
from moco_dist.config.address import Url
from moco_dist.config.architectures import KNOWN
from moco_dist.config.evaluate import EvalConfig
from moco_dist.config.source import read_config

# The options that are settings of an evaluation too, which checks them.
SETTINGS = {"image_size": "data.image-size", "batch_size": "data.batch-size", "num_workers": "data.num-workers",
            "device": "device", "precision": "precision"}  # fmt: skip


def main(words: list[str]) -> int:
    """Write the features of any images into a file."""
    parser = Parser(
        "moco-dist features",
        description="features of any images, with labels or without, by the backbone of a run or of a file of weights; "
        "what was stopped goes on by the same command",
        epilog="On several GPUs: torchrun --nproc-per-node N -m moco_dist features ...",
    )
    parser.add_argument("backbone", type=Path, metavar="RUN|FILE", help="a run, or a file as moco-dist import takes it")
    parser.add_argument(
        "images", type=Url, metavar="IMAGES", help="a folder, tar shards, a packed file, or their address"
    )
    parser.add_argument("--out", type=Path, required=True, help="FILE.parquet (extra: parquet) or FILE.npz")
    parser.add_argument("--page", type=Path, help="FILE.html to look at too: neighbours of some images, and a map")
    parser.add_argument("--arch", default="resnet50", help=f"of FILE: {KNOWN} [default: %(default)s]")
    parser.add_argument("--stem", default="imagenet", help="of FILE: imagenet or cifar [default: %(default)s]")
    parser.add_argument("--image-size", help="side of the centre crop in pixels [default: the run's; 224 for FILE]")
    parser.add_argument("--batch-size", help="images a rank encodes at once [default: 256]")
    parser.add_argument("--num-workers", help="loader processes a rank [default: its share of the cores]")
    parser.add_argument("--device", help="auto, cpu or cuda [default: auto]")
    parser.add_argument("--precision", help="auto, fp32, bf16 or fp16 [default: auto]")
    args = parser.parse_args(words)
    parts = args.out.with_name(f".{args.out.name}.parts")
    given = {setting: getattr(args, name) for name, setting in SETTINGS.items() if getattr(args, name) is not None}
    flags = [word for setting, value in given.items() for word in (f"--{setting}", value)]
    config = read_config(EvalConfig, None, ["--run-dir", str(parts), *flags])
    with ranks(config) as world:
        with quick_imports():
            from moco_dist.evaluate.any_images import look_at, open_backbone, require_suffix, write_features

        require_suffix(args.out)
        size, precision = config.data.image_size, config.precision
        opened = open_backbone(args.backbone, world, args.arch, args.stem, size, precision)
        images = write_features(opened, args.images, args.out, config, world)
    if not world.is_main:
        return 0
    after = f", after {opened.encoder.step:,} steps" if opened.encoder.step else ""  # not of another program's weights
    what = f"{len(images.paths):,} x {opened.encoder.dim} features{after}"
    print(f"wrote {args.out}: {what}")
    if args.page:
        from moco_dist.report.map import write_features_page

        seen, thumbnails_of = look_at(opened, images, config)
        summary = [what, f"{opened.identity['arch']} of {args.backbone}", f"images of {args.images}"]
        write_features_page(args.page, summary, images, seen.neighbours, seen.mapped, seen.components, thumbnails_of)
        print(f"wrote {args.page}")
    shutil.rmtree(parts, ignore_errors=True)
    return 0
