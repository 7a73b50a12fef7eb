"""The stream readers that `sources` is measured beside: webdataset and LitData, each if it is installed.

They give the bytes of images; these are decoded and cropped by the same functions as in this program, so what differs
is how the bytes come.
"""

import contextlib
import importlib
import io
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.slow_store import BUCKET, SlowStore
from moco_dist.config.augment import AugmentConfig
from moco_dist.data import counter_rng
from moco_dist.data.crops import crop_box, crop_draws, is_flipped, smallest_side
from moco_dist.data.decode import cut
from moco_dist.data.tasks import Crop

SHUFFLE_BUFFER = 1_000  # images, of webdataset
CHUNK = "16MB"  # of LitData


def loaded(images: Iterable[bytes], count: int, batch: int, size: int) -> None:
    """Decode two crops of each of `count` images, in batches."""
    augment = AugmentConfig()
    views = torch.empty(batch, 2, size, size, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    for number, data in zip(range(count), images, strict=False):
        draws = [crop_draws(0, 0, np.array([number]), stream)[0]
                 for stream in (counter_rng.STREAM_CROP_Q, counter_rng.STREAM_CROP_K)]  # fmt: skip

        def crops(width: int, height: int, draws: Any = draws) -> list[Crop]:
            smallest = smallest_side(width, height, augment.crop_scale)
            return [Crop(crop_box(draw, width, height, augment.crop_scale), is_flipped(draw, augment.flip_probability),
                         smallest=smallest) for draw in draws]  # fmt: skip

        for view, cropped in enumerate(cut(memoryview(data), "an image", size, crops)):
            views[number % batch, view] = cropped
        last = number
    assert last == count - 1


def is_installed(name: str) -> bool:
    """Whether it is; says so if not."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name} is not measured: {error}; pip install --target FOLDER {name}, and PYTHONPATH=FOLDER")
        return False
    return True


def webdataset_images(shards: list[str], seed: int) -> Iterable[bytes]:
    """The images of tar shards on a disk or at http addresses, by its shuffle of shards and its buffer."""
    import webdataset

    found = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=seed, empty_check=False)
    for sample in found.shuffle(SHUFFLE_BUFFER):
        yield sample["jpg"]


def write_litdata(files: list[Path], out: Path) -> None:
    """Its own format, of the same JPEGs."""
    import litdata

    with contextlib.redirect_stdout(io.StringIO()):
        litdata.optimize(fn=bytes_of, inputs=[str(file) for file in files], output_dir=str(out), chunk_bytes=CHUNK,
                         num_workers=1, verbose=False)  # fmt: skip


def bytes_of(path: str) -> bytes:
    """The content of a file."""
    return Path(path).read_bytes()


def litdata_images(root: str, cache: Path | None, seed: int, url: str) -> Iterable[bytes]:
    """The images of its format on a disk, or in the store at `url` with a cache on the disk."""
    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no setting for a store at http://
    of_store: dict[str, Any] = {}
    if cache is not None:
        keys = {"aws_access_key_id": "benchmark", "aws_secret_access_key": "benchmark", "region_name": "us-east-1"}
        of_store = {"cache_dir": str(cache), "storage_options": {"endpoint_url": url, **keys}}
    return litdata.StreamingDataset(root, shuffle=True, seed=seed, **of_store)


def versions() -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in ("webdataset", "litdata"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


Run = Callable[[int], None]


def rows_of(
    files: list[Path], shards: Path, scratch: Path, store: SlowStore, count: int, batch: int, size: int
) -> dict[str, Run]:
    """What is measured, by name: a function of a round's number, of which the first finds nothing in a warm cache.

    Args:
        files: the images.
        shards: folder of tar shards of them, which lies in the store as `shards` too.
        scratch: for what is written.
        store: the store.
        count: images a round.
        batch: images at once.
        size: side of a crop in pixels.
    """
    found: dict[str, Run] = {}
    if is_installed("webdataset"):
        local = [str(path) for path in sorted(shards.iterdir())]
        remote = [f"{store.url}/{BUCKET}/shards/{path.name}" for path in sorted(shards.iterdir())]
        for name, urls in (("webdataset, tar shards", local), ("webdataset, from the store", remote)):
            found[name] = lambda turn, urls=urls: loaded(webdataset_images(urls, turn), count, batch, size)
    if is_installed("litdata"):
        write_litdata(files, scratch / "litdata")
        store.upload(scratch / "litdata", "litdata")

        def local_run(turn: int) -> None:
            loaded(litdata_images(str(scratch / "litdata"), None, turn, store.url), count, batch, size)

        def remote_run(turn: int, kind: str) -> None:
            cache = scratch / f"litdata-{kind}-{turn if kind == 'cold' else 0}"
            cache.mkdir(exist_ok=True)
            loaded(litdata_images(f"s3://{BUCKET}/litdata", cache, turn, store.url), count, batch, size)

        found["LitData, its own format"] = local_run
        found["LitData, from the store, cold cache"] = lambda turn: remote_run(turn, "cold")
        found["LitData, from the store, warm cache"] = lambda turn: remote_run(turn, "warm")
    return found
