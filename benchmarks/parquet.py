"""What one image of a parquet file costs: read in its turn, and at random, as a training reads.

    python -m benchmarks.parquet [--images 1000 --asked 50 --rounds 5 --quick]

Row groups of 100 images, as the Hugging Face hub has them. A reader that wants one image reads the row group that it
lies in; a reader that goes forwards reads each of them once, and a packed file gives any image alone. The files are in
memory, so the times are of reading and copying; what a disk or a network has to give beside it is counted in bytes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import results
from benchmarks.photos import make_photos, source_of_photos
from moco_dist.data.packed import PackedFile
from moco_dist.data.sources import find_images
from moco_dist.datasets.pack import pack
from moco_dist.datasets.parquet import parquet_splits
from moco_dist.datasets.parquet_files import find_parquet

ROWS_A_GROUP, BLOCK, COLUMN = 100, 256, "image.bytes"


def write(path: Path, files: list[Path]) -> None:
    """The images in a parquet file, as the hub's library writes it."""
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pq.write_table(pa.table({"image": rows, "label": [0] * len(rows)}), path, row_group_size=ROWS_A_GROUP)


def cpu_ms(read: Callable[[], int]) -> float:
    """Own CPU milliseconds of an image; `read` returns how many it has read."""
    started = time.process_time()
    count = read()
    return 1e3 * (time.process_time() - started) / count


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--asked", type=int, default=50, help="images that are asked for at random")
    parser.add_argument("--rounds", type=int, default=5)
    args = results.parse(parser, images=120, asked=4, rounds=1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        image_bytes = make_photos(top / "folder", args.images)
        path = top / "train.parquet"
        write(path, sorted((top / "folder" / "train").rglob("*.jpg")))
        packed = PackedFile(find_images(pack(path, top / "x.beton"), "train"))
        opened = pq.ParquetFile(path)

        def forwards() -> int:
            _, read = parquet_splits(find_parquet(path), None, None, BLOCK)["train"]
            return sum(1 for row in range(args.images) if read(row))

        def at_random() -> int:
            for row in rng.integers(0, args.images, args.asked).tolist():
                group, place = divmod(row, ROWS_A_GROUP)
                opened.read_row_group(group, [COLUMN]).column(0).chunk(0).field(0)[place].as_py()
            return args.asked

        def of_packed() -> int:
            for row in rng.integers(0, args.images, args.asked).tolist():
                packed._content(row)
            return args.asked

        ways = {"parquet, forwards": forwards, "parquet, at random": at_random, "packed file, at random": of_packed}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds + 1):  # the first is not counted
            for name, read in ways.items():
                milliseconds = cpu_ms(read)
                if turn:
                    times[name].append(milliseconds)
        group_bytes = statistics.mean(
            opened.metadata.row_group(group).column(0).total_compressed_size for group in range(opened.num_row_groups)
        )
    read_bytes = {"parquet, at random": group_bytes}
    rows = [
        {"name": name, "cpu_ms_per_image": statistics.median(values),
         "read_bytes_per_image": read_bytes.get(name, image_bytes)}
        for name, values in times.items()
    ]  # fmt: skip
    for row in rows:
        print(row)
    results.write("parquet", rows, images=args.images, rows_a_group=ROWS_A_GROUP, image_bytes=image_bytes,
                  cut_out_of=source_of_photos())  # fmt: skip


if __name__ == "__main__":
    main()
