"""How long a start takes to know its images, and how much memory that costs: 1.28 million of them, and 14 million.

    python -m benchmarks.index [--folder FOLDER --listed 1281167 --repeats 3 --quick]

Listing is measured on empty files, which listing cannot tell from images. An index is made of as many images as
ImageNet-1k and ImageNet-22k have, of a folder, of tar shards and of shards in an object store (moto's server of S3's
protocol); a packed file is its own index. It is opened by processes that do nothing else; the file is in the page
cache. Four workers are then forked, and each asks for names, labels and places of images at random.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import results
from moco_dist.config.address import Url
from moco_dist.data import beton
from moco_dist.data.index import NAME, VERSION
from moco_dist.data.mapped import file_of
from moco_dist.data.names import hash_of_list
from moco_dist.data.processes import made_by_processes
from moco_dist.data.remote import index as remote_index
from moco_dist.data.remote.shards import find_remote_shards
from moco_dist.data.remote.store import apart
from moco_dist.data.sources import find_images
from moco_dist.data.tar.index import asked_of, index_content, place_of
from moco_dist.data.tar.layout import find_shards
from moco_dist.data.tar.listing import Listed, Lists
from moco_dist.files import write_whole

SIZES = ((1_281_167, 1_000, 1_024), (14_197_122, 21_841, 4_096))  # images, classes, shards
WORKERS, ASKED = 4, 200_000  # forked workers; images that each asks for
OPEN = "--open"  # ROOT INDEX_FOLDER: what this script calls itself with
NAME_BYTES = len("n00000000/n00000000_00000000.JPEG\n")
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}


def make_files(folder: Path, count: int, classes: int) -> None:
    """COUNT empty files over so many class folders, last changed a minute ago."""
    for c in range(classes):
        place = folder / "train" / f"n{c:08d}"
        place.mkdir(parents=True)
        for i in range(c, count, classes):
            os.close(os.open(place / f"n{c:08d}_{i:08d}.JPEG", os.O_CREAT))
        os.utime(place, (time.time() - 60, time.time() - 60))


def listing_seconds(folder: Path) -> float:
    """Of one start that lists the files."""
    (folder / "train" / NAME).unlink(missing_ok=True)
    started = time.perf_counter()
    find_images(folder, "train", remember=False)
    return time.perf_counter() - started


@functools.lru_cache(maxsize=1)
def columns(images: int, classes: int) -> dict[str, NDArray[Any]]:
    """Names such as n00000012/n00000012_00034567.JPEG, sorted, and labels, as an index has them."""
    label = np.arange(images) * classes // images
    content = np.empty((images, NAME_BYTES), np.uint8)
    content[:] = np.frombuffer(b"n00000000/n00000000_00000000.JPEG\n", np.uint8)
    for digit in range(8):
        content[:, 8 - digit] = content[:, 18 - digit] = 48 + label // 10**digit % 10
        content[:, 27 - digit] = 48 + np.arange(images) // 10**digit % 10
    ends = np.arange(1, images + 1) * NAME_BYTES - 1
    return {"content": content.reshape(-1)[:-1], "ends": ends, "label": label}


def write_folder(top: Path, images: int, classes: int, shards: int) -> Path:
    """A folder of empty class folders, whose index says what lies in them."""
    names = [f"n{c:08d}" for c in range(classes)]
    for name in names:
        (top / "train" / name).mkdir(parents=True)
    facts = {"version": VERSION, "top": names, "classes": names, "content_hash": "0" * 64}
    folders = {f"{name}/": (top / "train" / name).stat().st_mtime_ns for name in names}
    arrays = dict(columns(images, classes))
    arrays["labels"] = arrays.pop("label")
    write_whole(top / "train" / NAME, file_of({**facts, "folders": folders}, arrays))
    return top


def lists_of(images: int, classes: int, shards: int) -> Lists:
    """The images of tar shards, 110 kB each."""
    shard = (np.arange(images) * shards // images).astype(np.int32)
    offset, size = np.arange(images) * 110_000, np.full(images, 110_000)
    listed = Listed(shard=shard, offset=offset, size=size, **columns(images, classes))
    return Lists([f"n{c:08d}" for c in range(classes)], {"train": listed}, {"train": "0" * 64})


def write_tars(top: Path, images: int, classes: int, shards: int) -> Path:
    """Files without content for shards, and the index of them."""
    for shard in range(shards):
        (top / f"set-train-{shard:05d}.tar").touch()
    found = find_shards(top)
    write_whole(place_of(top, top), index_content(lists_of(images, classes, shards), asked_of(top, found)))
    return top


def write_packed(top: Path, images: int, classes: int, shards: int) -> Path:
    """A packed file without images: its tables alone, which are all that a start reads."""
    listed, path = columns(images, classes), top / "set.beton"
    names = np.empty((images, len(b"train/") + NAME_BYTES - 1), np.uint8)
    names[:, :6] = np.frombuffer(b"train/", np.uint8)
    names[:, 6:] = np.append(listed["content"], 0).reshape(images, NAME_BYTES)[:, :-1]
    with path.open("wb") as file, beton.BetonWriter(file, images) as writer:
        records = np.zeros(images, writer._record)
    at = beton._HEADER.itemsize + 3 * beton._FIELD.itemsize
    first = at + records.nbytes
    records["f0"]["at"], records["f1"] = first + np.arange(images), listed["label"]
    records["f2"]["at"], records["f2"]["size"] = first + images + np.arange(images) * names.shape[1], names.shape[1]
    table = np.zeros((2, images), beton._TABLE)
    table["sample"], table["at"] = np.arange(images), [records["f0"]["at"], records["f2"]["at"]]
    table["size"] = [[1], [names.shape[1]]]
    with path.open("r+b") as file:
        fields = file.read(at)[beton._HEADER.itemsize :]
        header = (beton.VERSION, 3, beton.PAGE_BYTES, images, first + images + names.nbytes)
        file.seek(0)
        file.write(np.array([header], beton._HEADER).tobytes() + fields)
        for part in (records, np.zeros(images, np.uint8), names, table):
            file.write(part.data.cast("B"))
        file.truncate()
    return path


def write_store(top: Path, images: int, classes: int, shards: int) -> Url:
    """Objects of a byte for shards, in a bucket of their own, and the index of them in `top`."""
    place = f"{os.environ['AWS_ENDPOINT_URL']}/set-{images}"
    headers = {"Content-Type": "application/octet-stream"}
    for key in ("", *(f"/train-{shard:05d}.tar" for shard in range(shards))):
        request = urllib.request.Request(f"{place}{key}", b"x" if key else b"", headers, method="PUT")
        urllib.request.urlopen(request, timeout=20).close()
    root = Url(f"s3://set-{images}")
    (found,) = made_by_processes(lambda _: find_remote_shards(root), range(1), 1, 1)  # this process starts others
    about = json.dumps(remote_index._about(found))
    kept = top / f"{hash_of_list([root])[:16]}.tars"
    write_whole(kept, index_content(lists_of(images, classes, shards), about))
    return root


@contextlib.contextmanager
def store() -> Iterator[None]:
    """A server of S3's protocol, which the environment leads to, for the length of a `with`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    os.environ |= {**CREDENTIALS, "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port())}
    yield
    server.stop()


WAYS: dict[str, Callable[[Path, int, int, int], Path | Url]] = {
    "folder": write_folder, "tar shards": write_tars, "packed": write_packed, "shards in a store": write_store,
}  # fmt: skip


def memory(kind: str) -> int:
    """Bytes of this process, by /proc/self/smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) * 2**10


def forked(ask: Callable[[int], dict[str, int]]) -> list[dict[str, int]]:
    """What `ask` returns in each of so many forks of this process, all at once; without torch, which has to be read."""
    pipes = []
    for number in range(WORKERS):
        here, there = os.pipe()
        if not os.fork():
            os.write(there, json.dumps(ask(number)).encode())
            os._exit(0)
        os.close(there)
        pipes.append(here)
    answers = [json.loads(os.read(pipe, 2**16)) for pipe in pipes]
    for _ in pipes:
        os.wait()
    return answers


def open_once(root: Path | Url, index_folder: Path) -> dict[str, float]:
    """Open an index as a start does, and let forked workers ask it."""
    before, started = memory("Anonymous"), time.perf_counter()
    found = find_images(root, "train", index_folder=index_folder)
    opened = time.perf_counter() - started
    if isinstance(root, Url):  # what the store takes to say which shards there are, once more
        apart(lambda: find_remote_shards(root))
    store = time.perf_counter() - started - opened
    _ = found.list_hash, found.content_hash
    hashed, own = time.perf_counter() - started - opened - store, memory("Anonymous") - before

    def asks(number: int) -> dict[str, int]:
        rows = np.random.default_rng(number).integers(0, len(found.paths), ASKED)
        first = memory("Private_Dirty")
        for row in rows.tolist():
            _ = found.paths[row], found.labels[row]
            if found.places is not None:
                _ = found.places.file[row], found.places.offset[row], found.places.size[row]
        grown = memory("Private_Dirty") - first
        return {"grown": grown, "shared": memory("Rss") - memory("Private_Dirty")}

    workers = forked(asks)
    return {
        "images": len(found.paths), "open_seconds": opened, "store_seconds": store, "hash_seconds": hashed,
        "own_bytes": own,
        "worker_grown_bytes": max(worker["grown"] for worker in workers),
        "worker_shared_bytes": max(worker["shared"] for worker in workers),
    }  # fmt: skip


def measured(root: Path | Url, index_folder: Path, repeats: int) -> dict[str, float]:
    """Medians of openings, each by a process of its own."""
    words = [sys.executable, "-m", "benchmarks.index", OPEN, str(root), str(index_folder)]
    readings = [
        json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(repeats)
    ]
    return {key: statistics.median(reading[key] for reading in readings) for key in readings[0]}


def main() -> None:
    """Measure and write the results file."""
    if sys.argv[1:2] == [OPEN]:
        root = sys.argv[2]
        print(json.dumps(open_once(Url(root) if "://" in root else Path(root), Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--listed", type=int, default=1_281_167, help="files that are made to list them")
    parser.add_argument("--repeats", type=int, default=3, help="openings, each by a process of its own")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what an index is of (default all)")
    results.add_earlier(parser)
    args = results.parse(parser, sizes=((2_000, 10, 4),), listed=2_000, repeats=1)
    sizes = getattr(args, "sizes", SIZES)
    rows = []
    with contextlib.ExitStack() as stack:
        if "shards in a store" in args.ways:
            stack.enter_context(store())
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder))
        make_files(Path(scratch) / "files", args.listed, sizes[0][1])
        listing = [listing_seconds(Path(scratch) / "files") for _ in range(args.repeats)]
        for images, classes, shards in sizes:
            for name, write in ((name, WAYS[name]) for name in args.ways):
                top = Path(scratch) / f"{name} {images}"
                top.mkdir()
                root = write(top, images, classes, shards)
                kept = next(path for path in top.rglob("*") if path.is_file() and path.stat().st_size > images)
                rows.append({"name": name, "classes": classes, "shards": shards if "shards" in name else None,
                             "index_bytes": kept.stat().st_size, **measured(root, top, args.repeats)})  # fmt: skip
                kept.unlink()
                print(rows[-1])
            columns.cache_clear()
    facts = {"workers": WORKERS, "asked_of_each": ASKED, "repeats": args.repeats}
    if args.earlier != "drop":
        is_new = {(row["name"], row["images"]) for row in rows}
        earlier = results.earlier_rows("index", "cpu", **facts)
        rows = [*rows, *(row for row in earlier if (row["name"], row["images"]) not in is_new)]
        rows.sort(key=lambda row: (row["images"], list(WAYS).index(row["name"])))
    listed = {"images": args.listed, "seconds": statistics.median(listing)}
    about = "local disk, its names in memory: a network's listing takes longer"
    results.write("index", rows, listing=listed, **facts, file_system=about, load_average=os.getloadavg()[0])


if __name__ == "__main__":
    main()
