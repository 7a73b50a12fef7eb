"""`moco-dist export` and `moco-dist import`: weights for other programs, and from them."""

from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.cli.imports import quick_imports
from moco_dist.config.architectures import KNOWN


def export(words: list[str]) -> int:
    """Write a run's backbone for another program."""
    parser = Parser("moco-dist export", description="a run's backbone for another program")
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument(
        "--format", required=True,
        help="torchvision, timm, huggingface (a folder for timm and transformers), onnx, detectron2, or safetensors "
        "(head included)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="file, with the format's ending, or folder to write")
    args = parser.parse_args(words)

    with quick_imports():
        from moco_dist.run.export import export_run

    how = export_run(args.run_dir, args.format, args.out)
    print(f"wrote {args.out}; it loads by\n  {how}")
    return 0


def import_(words: list[str]) -> int:
    """Make a run's folder of a backbone that another program trained."""
    parser = Parser(
        "moco-dist import",
        description="a backbone of MoCo's original release, lightly, mmselfsup, torchvision or timm, to evaluate here",
    )
    parser.add_argument("file", type=Path, help=".pth.tar, .pth, .ckpt or .safetensors; no code in it is run")
    parser.add_argument("--arch", default="resnet50", help=f"{KNOWN} [default: %(default)s]")
    parser.add_argument("--stem", default="imagenet", help="imagenet, or cifar (3 x 3, no pooling) [default: imagenet]")
    parser.add_argument("--data-root", type=Path, default=Path("data/imagenet"), help="images to evaluate on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run to make")
    args = parser.parse_args(words)

    with quick_imports():
        from moco_dist.run.weights import import_backbone

    import_backbone(args.file, args.arch, args.data_root, args.out, args.stem)
    print(f"{args.out} is ready; evaluate it by\n  moco-dist knn --run-dir {args.out}")
    return 0
