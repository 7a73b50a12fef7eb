"""Data sets made ready on disk (`moco-dist data prepare`): OUT/train/CLASS/IMAGE and OUT/val/CLASS/IMAGE.

OUT appears at once and complete, or not at all: everything is written to a hidden folder beside it, which is
renamed at the end. OUT/dataset.json says what OUT holds; a second call finds it and does nothing.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST
from tqdm import tqdm

from moco_dist.data.datasets import ImageError, ImageFolder, find_images, read_image
from moco_dist.data.shapes import SHAPES, ShapeSettings, draw_image
from moco_dist.errors import UserError

T = TypeVar("T")

MARKER = "dataset.json"
UNREADABLE = "unreadable.txt"
OFFLINE_AFTER_SECONDS = 5
CHUNK = 64  # images a thread takes at a time, and so what an interrupt waits for

FASHION_MNIST_CLASSES = (
    "0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat",
    "5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_ankle-boot",
)
FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", 60_000),
    "val": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", 10_000),
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")


class _UnavailableError(Exception):
    """A source that cannot be had here; the text says why."""


def prepare_fashion_mnist(out: Path, source: Path | None = None) -> Path:
    """Fashion-MNIST: 60,000 + 10,000 gray PNGs of 28 pixels in ten classes (Xiao et al. 2017, arXiv 1708.07747).

    From `source`, else an installed Debian package, else a download, else the Debian package downloaded but not
    installed (needs no root).

    Args:
        out: folder to make.
        source: a folder with the four idx files, gzipped, under their published names.

    Returns:
        `out`.

    Raises:
        UserError: no source is at hand, a file is damaged, or `out` holds something else.
    """

    def write(partial: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = _fashion_mnist_folder(source, Path(scratch))
            for split, (images_file, labels_file, count) in FASHION_MNIST_FILES.items():
                images = _read_idx(folder / images_file, (count, 28, 28))
                labels = _read_idx(folder / labels_file, (count,))
                _write_pngs(partial / split, images, labels, FASHION_MNIST_CLASSES)

    return _prepare(out, {"name": "fashion-mnist"}, write)


def prepare_cifar10(out: Path) -> Path:
    """CIFAR-10: 50,000 + 10,000 colour PNGs of 32 pixels in ten classes, downloaded (Krizhevsky 2009).

    Returns:
        `out`.

    Raises:
        UserError: the download fails, or `out` holds something else.
    """

    def write(partial: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                with _downloading(CIFAR10.url):
                    parts = {"train": CIFAR10(scratch, True, download=True), "val": CIFAR10(scratch, False)}
            except _UnavailableError as error:
                raise UserError(
                    f"CIFAR-10 cannot be had: {error}; `fashion-mnist` has other sources, and `shapes` needs none"
                ) from None
            for split, part in parts.items():
                _write_pngs(partial / split, part.data, np.array(part.targets), tuple(part.classes))

    return _prepare(out, {"name": "cifar10"}, write)


def prepare_shapes(
    out: Path, seed: int = 0, num_train: int = 8_000, num_val: int = 2_000, settings: ShapeSettings | None = None
) -> Path:
    """The generated set of `moco_dist.data.shapes`, as JPEGs: needs nothing but some seconds.

    Args:
        out: folder to make.
        seed: of every image, with its split and number.
        num_train: training images, over all classes.
        num_val: validation images, over all classes.
        settings: what the images look like; default: ShapeSettings().

    Returns:
        `out`.

    Raises:
        UserError: fewer images than classes, or `out` holds something else.
    """
    names, settings = tuple(SHAPES), settings or ShapeSettings()
    if min(num_train, num_val) < len(names):
        raise UserError(f"num_train {num_train} and num_val {num_val} must be at least {len(names)}, one a class")

    def write_one(i: int, folder: Path, stream: int) -> None:
        image = draw_image(i % len(names), np.random.default_rng([seed, stream, i]), settings)
        image.save(folder / names[i % len(names)] / f"{i:05d}.jpg", quality=settings.jpeg_quality)

    def write(partial: Path) -> None:
        for stream, (split, count) in enumerate({"train": num_train, "val": num_val}.items()):
            _make_class_folders(partial / split, names)
            _in_threads(functools.partial(write_one, folder=partial / split, stream=stream), count, f"drawing {split}")

    recipe = {"seed": seed, "num_train": num_train, "num_val": num_val, "settings": dataclasses.asdict(settings)}
    return _prepare(out, {"name": "shapes", **recipe}, write)


def prepare_imagefolder(out: Path, source: Path, val_share: float | None = None) -> Path:
    """Checks your own folder of class folders, decoding every image, and makes `out` of links to the good ones.

    Files that cannot be read are left out and listed in OUT/unreadable.txt, with the reasons.

    Args:
        out: folder to make; outside of `source`, which it needs from then on.
        source: SOURCE/train and SOURCE/val, or one folder of class folders or of images.
        val_share: share of every class's images, in (0, 1), that becomes OUT/val where the source has no val.

    Returns:
        `out`.

    Raises:
        UserError: `source` has no readable images or a layout that does not fit, or `out` holds something else.
    """
    source = source.absolute()
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies in its source {source}; choose a folder outside")
    if val_share is not None and not 0 < val_share < 1:
        raise UserError(f"val_share {val_share} is not a share; one above 0 and below 1 is, such as 0.1")
    if val_share is not None and (source / "val").is_dir():
        raise UserError(f"{source} has a validation set, so val_share {val_share} has nothing to do; leave it out")

    def write(partial: Path) -> None:
        splits: tuple[Literal["train", "val"], ...] = ("train", "val") if (source / "val").is_dir() else ("train",)
        problems: list[str] = []
        for split in splits:
            folder = find_images(source, split)
            found = _in_threads(functools.partial(_problem, folder), len(folder.paths), f"reading {split}")
            problems += [problem for problem in found if problem]
            good = np.array([not problem for problem in found])
            if not good.any():
                raise UserError(f"none of the {len(found)} images can be read; the first: {problems[0]}")
            is_val = good & _validation_part(folder.labels, good, val_share or 0)
            if val_share and not is_val.any():
                raise UserError(f"val_share {val_share} of every class of {good.sum()} images is no image; try more")
            _link(partial / split, folder, good & ~is_val)
            _link(partial / "val", folder, is_val)
        if problems:
            (partial / UNREADABLE).write_text("".join(f"{problem}\n" for problem in problems))

    return _prepare(out, {"name": "imagefolder", "source": str(source), "val_share": val_share}, write)


def _prepare(out: Path, recipe: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Lets `write` fill a hidden folder and renames it to `out`, unless `out` already is what `recipe` says."""
    recipe = json.loads(json.dumps(recipe))
    if _is_there(out, recipe):
        print(f"{out} is already there: {recipe['name']}, {_described(_counts(out))}")
        return out
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write(partial)
        counts = _counts(partial)
        (partial / MARKER).write_text(json.dumps({**recipe, "images": counts}, indent=2) + "\n")
        partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot prepare {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    left_out = out / UNREADABLE
    note = f"; {len(left_out.read_text().splitlines())} unreadable, see {left_out}" if left_out.exists() else ""
    print(f"{out} is ready: {recipe['name']}, {_described(counts)}{note}")
    return out


def _is_there(out: Path, recipe: dict[str, Any]) -> bool:
    if not (out / MARKER).is_file():
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} exists and is not a prepared data set; remove it or choose another folder")
        return False
    holds = json.loads((out / MARKER).read_text())
    images = holds.pop("images")
    if holds != recipe:
        differing = ", ".join(f"{k} {holds.get(k)!r}" for k in recipe | holds if holds.get(k) != recipe.get(k))
        raise UserError(f"{out} was prepared with {differing}; remove it or choose another folder")
    if images != _counts(out):
        raise UserError(
            f"{out} is damaged: it has {_described(_counts(out))} of {_described(images)}; remove it and prepare again"
        )
    return True


def _counts(root: Path) -> dict[str, int]:
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    return {split: len(find_images(root, split).paths) for split in splits if (root / split).is_dir()}


def _described(counts: dict[str, int]) -> str:
    return " + ".join(f"{count:,} {split}" for split, count in counts.items()) + " images"


def _fashion_mnist_folder(source: Path | None, scratch: Path) -> Path:
    """A folder with the four gzipped files."""
    names = [name for images, labels, _ in FASHION_MNIST_FILES.values() for name in (images, labels)]
    if source is not None:
        missing = [name for name in names if not (source / name).is_file()]
        if missing:
            raise UserError(f"source {source} lacks {', '.join(missing)}")
        return source
    installed = "/" / DEBIAN_FOLDER
    if all((installed / name).is_file() for name in names):
        return installed
    reasons = []
    for fetch in (_download_fashion_mnist, _fetch_debian_package):
        try:
            return fetch(scratch)
        except _UnavailableError as error:
            reasons.append(str(error))
    raise UserError(
        f"Fashion-MNIST cannot be had: {'; '.join(reasons)}. Give a source folder with {', '.join(names)}, "
        "or prepare `shapes`, which is generated"
    )


def _download_fashion_mnist(scratch: Path) -> Path:
    with _downloading(FashionMNIST.mirrors[0] + FashionMNIST.resources[0][0]):
        return Path(FashionMNIST(str(scratch), download=True).raw_folder)


def _fetch_debian_package(scratch: Path) -> Path:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise _UnavailableError("there is no apt-get for Debian's package of it")
    options = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10", "-o", "Acquire::https::Timeout=10"]
    _run(["apt-get", "-qq", *options, "download", DEBIAN_PACKAGE], scratch)
    _run(["dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), "debian"], scratch)
    return scratch / "debian" / DEBIAN_FOLDER


def _run(command: list[str], cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=600)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise _UnavailableError(f"{command[0]} failed ({last})") from error
    except subprocess.TimeoutExpired as error:
        raise _UnavailableError(f"{command[0]} took longer than {error.timeout:.0f} s") from error


@contextlib.contextmanager
def _downloading(url: str) -> Iterator[None]:
    """Gives up within seconds where `url` cannot be reached; torchvision's progress bars only on a terminal."""
    outcome: list[str] = []

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=OFFLINE_AFTER_SECONDS).close()
            outcome.append("")
        except OSError as error:
            outcome.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=probe, daemon=True)  # a name look-up has no timeout of its own
    thread.start()
    thread.join(OFFLINE_AFTER_SECONDS)
    problem = outcome[0] if outcome else f"no answer within {OFFLINE_AFTER_SECONDS} s"
    if problem:
        raise _UnavailableError(f"{url} cannot be reached ({problem})")
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(6 * OFFLINE_AFTER_SECONDS)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    except (RuntimeError, OSError) as error:  # what torchvision raises for a broken or forged download
        raise _UnavailableError(f"the download of {url} failed ({' '.join(str(error).split())})") from error
    finally:
        socket.setdefaulttimeout(previous)


def _read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An idx file of bytes (big-endian: magic number, sizes, data), which must have this shape."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    header = np.array([8 << 8 | len(shape), *shape], dtype=">i4").tobytes()
    if not content.startswith(header) or len(content) != len(header) + int(np.prod(shape)):
        raise UserError(f"{path} is not an idx file of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def _make_class_folders(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def _write_pngs(folder: Path, images: NDArray[np.uint8], labels: NDArray, names: tuple[str, ...]) -> None:
    """(N, H, W) or (N, H, W, 3) to folder/CLASS/NUMBER.png."""
    _make_class_folders(folder, names)

    def write(i: int) -> None:
        Image.fromarray(images[i]).save(folder / names[labels[i]] / f"{i:05d}.png", compress_level=1)

    _in_threads(write, len(images), f"writing {folder.name}")


def _problem(folder: ImageFolder, i: int) -> str:
    """Why image i cannot be read; empty where it can."""
    try:
        read_image(folder.root / folder.paths[i])
    except ImageError as error:
        return str(error)
    return ""


def _validation_part(labels: NDArray[np.int64], good: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """(N,) true for a random `share` of every class's good images; the same for the same images."""
    chosen = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(0)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(good & (labels == label)))
        chosen[members[: round(share * len(members))]] = True
    return chosen


def _link(target: Path, folder: ImageFolder, chosen: NDArray[np.bool_]) -> None:
    for i in np.flatnonzero(chosen):
        link = target / folder.paths[i]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder.root / folder.paths[i])


def _in_threads(do: Callable[[int], T], count: int, what: str) -> list[T]:
    """do(0) .. do(count - 1) on all cores, in order; reading and writing images lets other threads run."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    results: list[T] = []
    with (
        tqdm(total=count, desc=what, unit="images", disable=None) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        try:
            for done in pool.map(lambda chunk: [do(i) for i in chunk], chunks):
                results += done
                bar.update(len(done))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results
