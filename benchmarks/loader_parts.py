"""What two 224-px crops of a JPEG of about 500 x 375 cost, by part, in CPU milliseconds an image.

    python -m benchmarks.loader_parts [--images 96] [--rounds 20] [--quick]

One thread makes the batches of pre-training by the functions that a loader's worker calls, with a clock between them:
CPU time of the thread. Of each image and part the lowest of the rounds counts, since other load on the machine makes
caches and shared cores slower. Beside the parts stands resizing in another layout of memory, in turn with them. Images:
benchmarks/photos.py.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results
from benchmarks.loader import BATCH, SIZE
from benchmarks.photos import HEIGHT, WIDTH, make_photos, source_of_photos
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import decode
from moco_dist.data.batch import CropBatch
from moco_dist.data.folder import read_bytes
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.data.tasks import DecodeTask, view_task
from moco_dist.data.workers import Files
from moco_dist.distributed.world import World

BESIDE = "beside it: cutting out and resizing in another layout"


class Clock:
    """CPU seconds of this thread by part, each time that it was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._since = time.thread_time()

    def ends(self, part: str) -> None:
        """What was done since the last part ended was `part`."""
        self.seconds.setdefault(part, []).append(time.thread_time() - self._since)
        self._since = time.thread_time()


def parts_of_steps(
    files: Files, task_of: Callable[[int], DecodeTask[CropBatch]], steps: range
) -> dict[str, list[float]]:
    """CPU seconds of each part, of each image or batch."""
    clock = Clock()
    for step in steps:
        task = task_of(step)
        clock.ends("random numbers and order")
        views = torch.empty(task.num_rows, SIZE, SIZE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for i, sample in enumerate(task.samples):
            data = read_bytes(files.folder.root / files.folder.paths[sample])
            clock.ends("reading the file")
            simplejpeg.decode_jpeg_header(data)
            clock.ends("its header")
            crops = task.crops(i, WIDTH, HEIGHT)
            clock.ends("boxes of the crops")
            pixels = decode._decode_jpeg(data, WIDTH, HEIGHT, 1)
            clock.ends("decoding")
            made = decode.cut_pixels(pixels, SIZE, [crop._replace(flip=False) for crop in crops])
            clock.ends("cutting out and resizing")
            made = [view.flip(-1) if crop.flip else view for view, crop in zip(made, crops, strict=True)]
            clock.ends("mirroring")
            _store(views, task.rows[i], made)
            clock.ends("copying into the batch")
            for x0, y0, x1, y1 in (crop.box for crop in crops):
                box = torch.from_numpy(pixels[y0:y1, x0:x1]).permute(2, 0, 1)[None]
                F.interpolate(box, (SIZE, SIZE), mode="bilinear", antialias=True)
            clock.ends(BESIDE)
        task.finish(views, ())
        clock.ends("random numbers and order")
    return clock.seconds


def _store(views: Tensor, rows: tuple[int, ...], made: list[Tensor]) -> None:
    for row, view in zip(rows, made, strict=True):
        views[row] = view


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=20)
    args = results.parse(parser, images=64, rounds=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        mean_bytes = make_photos(root, args.images)
        config = PretrainConfig.model_validate({
            "run": {"dir": "unused"}, "data": {"root": root, "image_size": SIZE}, "optim": {"global_batch_size": BATCH}
        })  # fmt: skip
        files, plan = Files(find_images(root, "train")), Plan(args.images, BATCH, 0)
        steps = range(args.images // BATCH)

        def task_of(step: int) -> DecodeTask[CropBatch]:
            return view_task(step, config, plan, World())

        rounds = [parts_of_steps(files, task_of, steps) for _ in range(args.rounds)]
    lowest = {part: np.min([found[part] for found in rounds], axis=0).sum() for part in rounds[0]}
    ms = {part: 1000 * float(seconds) / (len(steps) * BATCH) for part, seconds in lowest.items()}
    beside = ms.pop(BESIDE)
    whole = sum(ms.values())
    rows = [
        {"part": part, "cpu_ms_per_image": round(value, 4), "share": round(value / whole, 4)}
        for part, value in [*ms.items(), ("all of it", whole), (BESIDE, beside)]
    ]
    for row in rows:
        print(f"{row['part']:55} {row['cpu_ms_per_image']:7.3f} ms {100 * row['share']:5.1f} %")
    results.write("loader_parts", rows, images=args.images, rounds=args.rounds, crop_size=SIZE,
                  image_size=[WIDTH, HEIGHT], mean_file_bytes=round(mean_bytes),
                  cut_out_of=source_of_photos())  # fmt: skip


if __name__ == "__main__":
    main()
