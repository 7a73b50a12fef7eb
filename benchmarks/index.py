"""How long a start takes on 1.28 million images: listing the folders, and reading the index instead.

    python -m benchmarks.index [--images 1281167] [--folder FOLDER] [--quick]

Makes empty files in 1,000 class folders in FOLDER (default: a temporary one), which listing cannot tell from images.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import results
from moco_dist.data.index import NAME
from moco_dist.data.sources import find_images

CLASSES, REPEATS = 1000, 3


def make(folder: Path, count: int) -> None:
    """COUNT empty files over CLASSES folders, last changed a minute ago."""
    for c in range(CLASSES):
        place = folder / "train" / f"n{c:08d}"
        place.mkdir(parents=True)
        for i in range(c, count, CLASSES):
            os.close(os.open(place / f"n{c:08d}_{i}.JPEG", os.O_CREAT))
        os.utime(place, (time.time() - 60, time.time() - 60))


def seconds(folder: Path, with_index: bool) -> float:
    """Of one start."""
    if not with_index:
        (folder / "train" / NAME).unlink(missing_ok=True)
    started = time.perf_counter()
    find_images(folder, "train")
    return time.perf_counter() - started


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = results.parse(parser, images=2000)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        make(Path(scratch), args.images)
        listed, indexed = [], []
        for _ in range(REPEATS):  # in turn; a listing leaves the index for the next
            listed.append(seconds(Path(scratch), with_index=False))
            indexed.append(seconds(Path(scratch), with_index=True))
    row = {
        "images": args.images, "folders": CLASSES, "listing_seconds": statistics.median(listed),
        "index_seconds": statistics.median(indexed),
        "ratio": statistics.median(listed) / statistics.median(indexed),
    }  # fmt: skip
    print(row)
    results.write("index", [row], file_system="local disk, its names in memory: a network's listing takes longer")


if __name__ == "__main__":
    main()
