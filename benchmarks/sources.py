"""What a source of images costs: a folder, tar shards of it, and a packed file, read and decoded by the same loader.

    python -m benchmarks.sources [--images 2000 --rounds 5 --quick]

The sources take turns within one run, by one process without workers; wall-clock rate and own CPU time are medians. All
are read once before: the files are in memory, so the difference is what finding and reading costs, not the disk.
"""

import argparse
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import results
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.images import ImageFolder
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World

BATCH, SIZE, WIDTH, HEIGHT, SHARDS, CLASSES = 32, 224, 500, 375, 8, 10


def make_folder(root: Path, count: int) -> None:
    """ROOT/train/CLASS/NUMBER.jpg: smooth pictures with some noise, as large as photographs of their size."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "train" / f"class_{i % CLASSES}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) + rng.normal(
            0, 4, (HEIGHT, WIDTH, 1)
        )
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def make_shards(root: Path, out: Path) -> Path:
    """Tar shards of ROOT/train, every SHARDS-th image in each."""
    out.mkdir()
    files = sorted((root / "train").rglob("*.jpg"))
    for shard in range(SHARDS):
        with tarfile.open(out / f"train-{shard:04d}.tar", "w") as tar:
            for file in files[shard::SHARDS]:
                tar.add(file, file.relative_to(root / "train"))
    return out


def seconds_of(folder: ImageFolder, config: PretrainConfig, images: int) -> tuple[float, float]:
    """Wall-clock and own CPU seconds of the batches of `images` images."""
    plan = Plan(len(folder.paths), BATCH, 0)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in pretrain_batches(folder, config, plan, World(), 0, images // BATCH):
        pass
    return time.perf_counter() - wall, time.process_time() - cpu


def config_of(root: Path, loader: str) -> PretrainConfig:
    """Batches in this process alone."""
    data = {"root": root, "loader": loader, "image_size": SIZE, "num_workers": 0}
    return PretrainConfig.model_validate(
        {"run": {"dir": "unused"}, "data": data, "optim": {"global_batch_size": BATCH}}
    )  # fmt: skip


def main() -> None:
    """Measure and write results/sources_*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = results.parse(parser, images=64, rounds=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "folder"
        make_folder(root, args.images)
        sources = {
            "folder": (root, "torchvision"),
            "tar shards": (make_shards(root, Path(scratch) / "shards"), "torchvision"),
            "packed file": (pack(root, Path(scratch) / "folder.beton"), "ffcv"),
        }
        found = {name: (find_images(path, "train"), config_of(path, how)) for name, (path, how) in sources.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
        for turn in range(args.rounds + 1):  # the first brings all into memory
            for name, (folder, config) in found.items():
                seconds = seconds_of(folder, config, args.images)
                if turn:
                    times[name].append(seconds)
    rows = [row_of(name, values, times["folder"], args.images // BATCH * BATCH) for name, values in times.items()]
    for row in rows:
        print(row)
    results.write("sources", rows, images=args.images, rounds=args.rounds, image_size=[WIDTH, HEIGHT],
                  crop_size=SIZE, crops_per_image=2, shards=SHARDS)  # fmt: skip


def row_of(
    name: str, values: list[tuple[float, float]], folder: list[tuple[float, float]], images: int
) -> dict[str, Any]:
    """Medians of a source, and of its CPU time beside the folder's in the same round."""
    return {
        "name": name,
        "images_per_second": round(images / statistics.median(wall for wall, _ in values), 1),
        "cpu_ms_per_image": round(1_000 * statistics.median(cpu for _, cpu in values) / images, 3),
        "cpu_beside_folder": round(
            statistics.median(own / its for (_, own), (_, its) in zip(values, folder, strict=True)), 3
        ),
    }


if __name__ == "__main__":
    main()
