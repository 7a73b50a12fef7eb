"""What a source of images costs: a folder, tar shards of it, a packed file, and the shards in a store far away.

    python -m benchmarks.sources [--images 2000 --rounds 5 --quick]

The store is moto's S3 server, 20 ms away (`slow_store`), on the same cores; it is read without a cache, with an empty
one and with a full one. A web server as far away (nginx, if it is installed) is not written in Python.
Beside them stand webdataset, on the shards, and LitData, on its own format, if they are installed; their images are
decoded by the same functions.

The sources take turns within one run, by one process without workers; wall-clock rate and own CPU time are medians,
and so are the two of each ratio. All are read once before: local files are in memory, so the difference is what finding
and reading costs, not the disk. On a busy machine the CPU time says more than the rate.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import results, stream_readers
from benchmarks.slow_store import BUCKET, SlowStore, slow_store, slow_web_server
from benchmarks.stream_readers import Run
from moco_dist.config.address import Url
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World

BATCH, SIZE, WIDTH, HEIGHT, SHARDS, CLASSES = 32, 224, 500, 375, 8, 10
DELAY_SECONDS = 0.02  # between a request to the store and its answer
INDEX_IMAGES, INDEX_IMAGE_BYTES = 6, 16_384  # of a small shard: more than a window, so that each header is asked for


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


def run_of(root: Path | Url, loader: str, images: int, **data: Any) -> Run:
    """What loads so many images of `root`, by this process alone, without workers."""
    data |= {"root": root, "loader": loader, "image_size": SIZE, "num_workers": 0}
    config = PretrainConfig.model_validate(
        {"run": {"dir": "unused"}, "data": data, "optim": {"global_batch_size": BATCH}}
    )  # fmt: skip
    folder = find_images(root, "train")
    plan = Plan(len(folder.paths), BATCH, 0)

    def run(turn: int, cache: Path | None = None) -> None:
        """An epoch; each round has another one."""
        of_turn = config
        if cache is not None:
            of_turn = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": cache})})
        steps = plan.steps_per_epoch * turn, plan.steps_per_epoch * turn + images // BATCH
        for _ in pretrain_batches(folder, of_turn, plan, World(), *steps):
            pass

    return run


def seconds_of(run: Run, turn: int) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of this process and of children that have ended, as webdataset's curl."""
    wall, cpu = time.perf_counter(), os.times()
    run(turn)
    now = os.times()
    return time.perf_counter() - wall, sum(now[:4]) - sum(cpu[:4])


def main() -> None:
    """Measure and write results/sources_*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--index-shards", type=int, default=1_000)
    args = results.parse(parser, images=64, rounds=1, index_shards=8)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as name,
        slow_store(DELAY_SECONDS) as store,
        slow_web_server(Path(name) / "shards", DELAY_SECONDS) as web,
    ):
        scratch = Path(name)
        make_folder(scratch / "folder", args.images)
        shards = make_shards(scratch / "folder", scratch / "shards")
        store.upload(shards, "shards")
        index = index_of(scratch / "small", store, args.index_shards)
        print(index)
        runs = runs_of(scratch, store, web, args.images)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for turn in range(args.rounds + 1):  # the first brings all into memory, and into warm caches
            for name, run in runs.items():
                seconds = seconds_of(run, turn)
                if turn:
                    times[name].append(seconds)
                    print(f"{turn} {name:<36} {seconds[0]:.2f} s, {seconds[1]:.2f} s of CPU", flush=True)
    rows = [row_of(name, values, times["folder"], args.images // BATCH * BATCH) for name, values in times.items()]
    for row in rows:
        print(row)
    results.write("sources", rows, images=args.images, rounds=args.rounds, image_size=[WIDTH, HEIGHT],
                  crop_size=SIZE, crops_per_image=2, shards=SHARDS, delay_seconds=DELAY_SECONDS,
                  load_average_before=round(load, 1), index=index, peers=stream_readers.versions())  # fmt: skip


def index_of(folder: Path, store: SlowStore, shards: int) -> dict[str, Any]:
    """What it takes to list the images of many small shards in the store, by their headers."""
    folder.mkdir()
    content = os.urandom(INDEX_IMAGE_BYTES)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for i in range(INDEX_IMAGES):
                member = tarfile.TarInfo(f"class_{i}/{shard}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    store.upload(folder, "small")
    before, started = store.requests(), time.perf_counter()
    found = find_images(Url(f"s3://{BUCKET}/small"), "train")
    seconds = time.perf_counter() - started
    return {"shards": shards, "images": len(found.paths), "image_bytes": INDEX_IMAGE_BYTES,
            "requests": store.requests() - before, "seconds": round(seconds, 2)}  # fmt: skip


def runs_of(scratch: Path, store: SlowStore, web: str | None, images: int) -> dict[str, Run]:
    """What is measured, by name."""
    root, count = scratch / "folder", images // BATCH * BATCH
    packed = pack(root, scratch / "folder.beton")
    # All are found, and LitData's format is written, before this process uses obstore: after that it starts no others.
    remote = run_of(Url(f"s3://{BUCKET}/shards"), "torchvision", images)
    shards = f"train-{{0000..{SHARDS - 1:04d}}}.tar"
    of_web = {"tar shards on a web server": run_of(Url(f"{web}/{shards}"), "torchvision", images)} if web else {}
    peers = stream_readers.rows_of(sorted(root.rglob("*.jpg")), scratch / "shards", scratch, store, count, BATCH, SIZE)
    return {
        "folder": run_of(root, "torchvision", images),
        "tar shards": run_of(scratch / "shards", "torchvision", images),
        "packed file": run_of(packed, "ffcv", images),
        "tar shards in the store": remote,
        "tar shards in the store, cold cache": lambda turn: remote(turn, scratch / f"cold-{turn}"),
        "tar shards in the store, warm cache": lambda turn: remote(turn, scratch / "warm"),
        **of_web,
        **peers,
    }


def row_of(
    name: str, values: list[tuple[float, float]], folder: list[tuple[float, float]], images: int
) -> dict[str, Any]:
    """Medians of a source, and beside them the folder's."""
    wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
    folder_wall, folder_cpu = (statistics.median(column) for column in zip(*folder, strict=True))
    return {
        "name": name,
        "images_per_second": round(images / wall, 1),
        "rate_beside_folder": round(folder_wall / wall, 3),
        "cpu_ms_per_image": round(1_000 * cpu / images, 3),
        "cpu_beside_folder": round(cpu / folder_cpu, 3),
    }


if __name__ == "__main__":
    main()
