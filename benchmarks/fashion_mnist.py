"""The main job on real images: configs/fashion_mnist_r18.yaml on one GPU, then kNN and a linear classifier.

    python -m benchmarks.fashion_mnist [--data data/fashion-mnist] [--source FOLDER] [--epochs 200]
        [--earlier drop|keep|replace] [--quick]

The data set is prepared where it is not yet; without a network, bring its four idx files and name their folder.
A training that is ended by SIGTERM goes on with `--earlier keep`. --quick: an epoch on generated shapes.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import results
from moco_dist.datasets.prepare import prepare_shapes

CONFIG = "configs/fashion_mnist_r18.yaml"
QUICK = {  # flags of each command
    "pretrain": ["--data.num-workers", "0", "--optim.global-batch-size", "32", "--moco.queue-size", "64",
                 "--model.arch", "resnet10", "--model.bn-group-size", "16", "--log.knn-every-epochs", "0"],
    "evaluate": ["--data.num-workers", "0"],
}  # fmt: skip


def command(*words: str | Path) -> None:
    """`moco-dist WORDS`; ends with its status if that is not 0."""
    process = subprocess.Popen([sys.executable, "-m", "moco_dist", *map(str, words)])
    if status := process.wait():
        sys.exit(status)


def measure(data: Path, run_dir: Path, epochs: int, quick: bool) -> list[dict[str, float]]:
    """A row: accuracies in percent, and seconds; of the training, those of this call alone."""
    flags, device = QUICK if quick else {"pretrain": [], "evaluate": []}, "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    command("pretrain", CONFIG, "--data.root", data, "--run.dir", run_dir, "--optim.epochs", str(epochs),
            "--run.device", device, "--tracking.backend", "none", *flags["pretrain"])  # fmt: skip
    row = {"epochs": epochs, "pretrain_seconds_of_last_call": time.perf_counter() - started}
    for kind in ("knn", "linear"):
        more = {"knn": ["--neighbours", "[5]"], "linear": ["--epochs", "1"]}[kind] if quick else []
        command(kind, "--run-dir", run_dir, "--device", device, "--tracking", "none", *flags["evaluate"], *more)
        found = json.loads((run_dir / "eval" / f"{kind}_trained.json").read_text())
        row |= found["accuracy"] | {f"{kind}_seconds": found["seconds"]}
    return [row]


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--source", type=Path, default=Path("data/fashion-mnist-source"))
    parser.add_argument("--epochs", type=int, default=200)
    results.add_earlier(parser)
    args = results.parse(parser, epochs=1)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the training gets it too, and saves
    run_dir = Path("runs/benchmark_fashion_mnist")
    if args.quick:
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch) / "shapes"
            prepare_shapes(data, num_train=64, num_val=32)
            print(measure(data, Path(scratch) / "run", args.epochs, quick=True))
        return
    if not args.data.exists():
        source = ["--source", args.source] if args.source.exists() else []
        command("data", "prepare", "fashion-mnist", "--out", args.data, *source)
    if args.earlier != "keep" and run_dir.exists():
        shutil.rmtree(run_dir)
    rows = measure(args.data, run_dir, args.epochs, quick=False)
    print(rows)
    results.write("fashion_mnist", rows, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
