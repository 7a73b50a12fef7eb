"""What loading costs: two 224-px crops of each JPEG of about 500 x 375, by every loader, in CPU milliseconds an image.

The figure is CPU time of the process, all its threads, and of its workers, so other load on the machine matters little
and it is the same as seconds of one core: images/s of a core = 1,000 / it. Start-up is left out: the time of few
batches is taken from that of many. All ways take turns in one run; medians over the rounds are reported.

    python -m benchmarks.loader [--images 320] [--rounds 5] [--quick]

Images: benchmarks/photos.py. The decode floor is libjpeg-turbo on the region around both crops
(benchmarks/decode_floor.c; needs cc and libjpeg-dev, else it is left empty).
"""

import argparse
import ctypes
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks import results
from benchmarks.photos import HEIGHT, WIDTH, make_photos, source_of_photos
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import decode
from moco_dist.data.batch import CropBatch
from moco_dist.data.colours import apply_colours
from moco_dist.data.folder import read_bytes
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.data.tasks import view_task
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World
from moco_dist.errors import UserError

BATCH, SIZE = 32, 224
USUAL = "torchvision transforms, colours and blur on the CPU (usual)"


def main() -> int:
    """Measure and write results/loader_*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320, help="images a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured")
    args = results.parse(parser, images=64, rounds=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "photos"
        mean_bytes = make_photos(root, args.images)
        ways = {**usual_ways(root), **loader_ways(root)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        floors: list[dict[str, float]] = []
        for _ in range(args.rounds):
            for name, consume in ways.items():
                times[name].append(cpu_ms_per_image(consume, args.images))
            floors.append(decode_costs(root))
    rows = [{"name": name, **summary(values, times[USUAL])} for name, values in times.items()]
    if not torch.cuda.is_available():
        rows.append({"name": "loader dali, decoding on the GPU", "cpu_ms_per_image": None})
    decoding = {key: statistics.median(f[key] for f in floors) for key in floors[0]}
    if "floor_region_ms" in decoding:
        decoding["share_of_floor"] = decoding["floor_region_ms"] / decoding["ours_ms"]
    print_table(rows, decoding)
    results.write(
        "loader", rows, decoding=decoding, images=args.images, rounds=args.rounds, image_size=[WIDTH, HEIGHT],
        mean_file_bytes=round(mean_bytes), cut_out_of=source_of_photos(), crops_per_image=2, crop_size=SIZE,
        decoders={
            package.name: package.version
            for package in metadata.distributions()
            if package.name.startswith(("simplejpeg", "nvidia-dali"))
        },
    )  # fmt: skip
    return 0


def usual_ways(root: Path) -> dict[str, Callable[[int], None]]:
    """What everyone runs: PIL decodes, torchvision transforms each view on its own."""
    crop: list[Any] = [transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)), transforms.RandomHorizontalFlip()]
    colours = [
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], p=0.5),
    ]
    normalised = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    paths = sorted((root / "train" / "photos").iterdir())

    def way(transform: Callable[[Image.Image], Any]) -> Callable[[int], None]:
        def consume(count: int) -> None:
            torch.manual_seed(0)
            for path in paths[:count]:
                image = Image.open(path).convert("RGB")
                transform(image), transform(image)

        return consume

    return {
        USUAL: way(transforms.Compose([*crop[:1], *colours, *crop[1:], *normalised])),
        "torchvision transforms, crops alone": way(transforms.Compose([*crop, transforms.PILToTensor()])),
    }


def loader_ways(root: Path) -> dict[str, Callable[[int], None]]:
    """The three loaders, crops alone; and the first by a worker, and with the colours on the CPU as well."""
    packed, raw = root.with_suffix(".beton"), root.with_name("raw.beton")
    pack(root, packed)
    pack(root, raw, max_side=256, raw_share=1.0)

    def batches(loader: str, source: Path, count: int, **data: Any) -> Iterator[tuple[CropBatch, PretrainConfig]]:
        config = PretrainConfig.model_validate(
            {
                "run": {"dir": "unused"},
                "data": {"root": source, "loader": loader, "image_size": SIZE, **{"num_workers": 0, **data}},
                "optim": {"global_batch_size": BATCH},
            }
        )
        folder = find_images(source, "train")
        plan = Plan(len(folder.paths), BATCH, 0)
        world = World(device="cuda:0") if "dali" in data else World()
        for batch in pretrain_batches(folder, config, plan, world, 0, count // BATCH):
            yield batch, config

    def crops(loader: str, source: Path, **data: Any) -> Callable[[int], None]:
        def consume(count: int) -> None:
            for _ in batches(loader, source, count, **data):
                pass

        return consume

    def coloured(count: int) -> None:
        for batch, config in batches("torchvision", root, count):
            apply_colours(batch.view_q, batch.colours_q, config.augment)
            apply_colours(batch.view_k, batch.colours_k, config.augment)

    ways = {
        "loader torchvision": crops("torchvision", root),
        "loader torchvision, by a worker": crops("torchvision", root, num_workers=1),
        "loader torchvision, colours and blur batched on the CPU": coloured,
        "loader ffcv, JPEGs": crops("ffcv", packed),
        "loader ffcv, pixels of at most 256": crops("ffcv", raw),
    }
    try:
        crops("dali", root)(BATCH)
    except UserError as error:
        print(error)
    else:
        ways["loader dali, decoding on the CPU"] = crops("dali", root, num_workers=1)
        if torch.cuda.is_available():
            ways["loader dali, decoding on the GPU"] = crops("dali", root, num_workers=1, dali={"decode_on": "gpu"})
    return ways


def cpu_ms_per_image(consume: Callable[[int], None], images: int) -> float:
    """CPU time of this process and its workers for `images`, less that for a quarter of them, an image between."""
    few = max(BATCH, images // 4 // BATCH * BATCH)
    times = []
    for count in (few, images):
        started = _cpu_seconds()
        consume(count)
        times.append(_cpu_seconds() - started)
    return 1_000 * (times[1] - times[0]) / (images - few)


def _cpu_seconds() -> float:
    """Of this process, and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def decode_costs(root: Path) -> dict[str, float]:
    """CPU milliseconds an image: our decoder on the whole image, and libjpeg-turbo on the region around both crops."""
    paths = sorted((root / "train" / "photos").iterdir())
    config = PretrainConfig.model_validate({
        "run": {"dir": "unused"}, "data": {"root": root}, "optim": {"global_batch_size": BATCH}
    })  # fmt: skip
    task = view_task(0, config, Plan(len(paths), len(paths), 0), World())
    floor = _floor_library(root)
    ours, region, whole = [], [], []
    out = ctypes.create_string_buffer(WIDTH * (HEIGHT + 16) * 3)
    for i, sample in enumerate(task.samples):
        data = read_bytes(paths[sample])
        started = time.process_time()
        decode._decode_jpeg(data, WIDTH, HEIGHT, 1)
        ours.append(time.process_time() - started)
        if floor:
            boxes = np.array([crop.box for crop in task.crops(i, WIDTH, HEIGHT)])
            around = [*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()]
            region.append(floor.decode_region(data, len(data), *around, out))
            whole.append(floor.decode_region(data, len(data), 0, 0, WIDTH, HEIGHT, out))
    costs = {"ours_ms": ours, "floor_region_ms": region, "floor_whole_ms": whole}
    return {name: 1_000 * statistics.mean(values) for name, values in costs.items() if values}


def _floor_library(folder: Path) -> ctypes.CDLL | None:
    library = folder.parent / "decode_floor.so"
    if not library.exists():
        source = Path(__file__).with_name("decode_floor.c")
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ljpeg"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    found = ctypes.CDLL(str(library))
    found.decode_region.restype = ctypes.c_double
    found.decode_region.argtypes = [ctypes.c_char_p, ctypes.c_ulong, *[ctypes.c_int] * 4, ctypes.c_char_p]
    return found


def summary(values: list[float], usual: list[float]) -> dict[str, float]:
    """Median and spread, and how many times the usual way it is."""
    median = statistics.median(values)
    return {
        "cpu_ms_per_image": round(median, 3),
        "lowest": round(min(values), 3),
        "highest": round(max(values), 3),
        "images_per_second_per_core": round(1_000 / median, 1),
        "times_the_usual": round(statistics.median(usual) / median, 2),
    }


def print_table(rows: list[dict[str, Any]], decoding: dict[str, float]) -> None:
    """For eyes."""
    print(f"{'':58} CPU ms an image   images/s a core   x the usual")
    for row in rows:
        if row["cpu_ms_per_image"] is None:
            print(f"{row['name']:58} not measured: no GPU")
            continue
        print(f"{row['name']:58} {row['cpu_ms_per_image']:15.2f} {row['images_per_second_per_core']:17.0f} "
              f"{row['times_the_usual']:13.1f}")  # fmt: skip
    print("decoding alone, CPU ms an image:", {name: round(value, 3) for name, value in decoding.items()})


if __name__ == "__main__":
    sys.exit(main())
