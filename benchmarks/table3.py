"""Memory and time of MoCo against the end-to-end method, at several batch sizes: Table 3 of MoCo v2.

    python -m benchmarks.table3 [--arch resnet50] [--image-size 224] [--batches 32 128 512]
        [--earlier drop|keep|replace] [--quick]

The same measurement as `moco-dist reproduce table3` (moco_dist/planning/table3.py): one rank with its share of the
batch of 8, each method and batch in a process of its own, in turn. On a CPU smaller images and batches by default.
With `--earlier keep` it goes on where it was cut, by runs/table3.json.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import results
from moco_dist.config.architectures import ARCHITECTURES
from moco_dist.engine.precision import compute_dtype
from moco_dist.planning.table3 import LOCAL_BATCHES, ROUNDS, STEPS, as_markdown, configs_of, measure

CPU_SIDE, CPU_BATCHES = 64, (32, 64, 128)


def main() -> None:
    """Measure and write the results file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_cpu = device == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet50")
    parser.add_argument("--image-size", type=int, default=CPU_SIDE if is_cpu else 224)
    parser.add_argument("--batches", type=int, nargs="+", default=CPU_BATCHES if is_cpu else LOCAL_BATCHES)
    results.add_earlier(parser)
    args = results.parse(parser, arch="resnet10", image_size=32, batches=[32])
    kept = None if args.quick or args.earlier == "drop" else results.FOLDER.parents[1] / "runs" / "table3.json"
    if kept is not None:
        kept.parent.mkdir(exist_ok=True)
        if args.earlier == "replace":
            kept.unlink(missing_ok=True)
    flags = ["--model.arch", args.arch, "--data.image-size", str(args.image_size), "--run.device", device]
    configs = configs_of(Path("configs"), flags=flags)
    rows = measure(configs, args.batches, device, 1 if args.quick else STEPS, 1 if args.quick else ROUNDS, kept)
    print(as_markdown(rows))
    dtype = str(compute_dtype(configs["MoCo"].optim.precision, device)).removeprefix("torch.")
    queue_size = configs["MoCo"].moco.queue_size
    results.write("table3", rows, device, arch=args.arch, image_size=args.image_size, dtype=dtype,
                  queue_size=queue_size, threads=torch.get_num_threads())  # fmt: skip


if __name__ == "__main__":
    main()
