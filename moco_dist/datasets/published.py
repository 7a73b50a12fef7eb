"""Small data sets that others published, as arrays: where they are found, and whether they arrived whole."""

import contextlib
import errno
import gzip
import shutil
import socket
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10, FashionMNIST, Imagenette
from torchvision.datasets.utils import download_url

from moco_dist.errors import UnreachableError, UserError, file_error

OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}  # the written folder's, not a server's
SILENCE_SECONDS = 20  # a server may be silent so long before a download is given up

FASHION_MNIST_CLASSES = (
    "0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat",
    "5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_ankle-boot",
)  # fmt: skip
FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "val": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")


class Split(NamedTuple):
    """One split of a data set.

    Attributes:
        images: uint8 (N, H, W) gray or (N, H, W, 3) RGB.
        labels: integers (N,), indices into `classes`.
        classes: their names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.integer]
    classes: tuple[str, ...]


class _UnavailableError(Exception):
    """A source that cannot be had here; the text says why."""


def fashion_mnist(source: Path | None, scratch: Path) -> dict[str, Split]:
    """Fashion-MNIST: 60,000 + 10,000 gray images of 28 pixels in ten classes (Xiao et al. 2017, arXiv 1708.07747).

    From `source`, else an installed Debian package, else a download, else the Debian package downloaded but not
    installed (needs no root).

    Args:
        source: a folder with the four idx files, gzipped, under their published names.
        scratch: an empty folder, for downloads.

    Raises:
        UnreachableError: no source is at hand.
        UserError: a file is damaged.
    """
    folder = _fashion_mnist_folder(source, scratch)
    splits = {}
    for split, (images_file, labels_file) in FASHION_MNIST_FILES.items():
        images, labels = _read_idx(folder / images_file, 3), _read_idx(folder / labels_file, 1)
        if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_MNIST_CLASSES):
            raise UserError(f"{folder / labels_file} does not hold the labels of {images_file}")
        splits[split] = Split(images, labels, FASHION_MNIST_CLASSES)
    return splits


def cifar10(scratch: Path) -> dict[str, Split]:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 pixels in ten classes, downloaded (Krizhevsky 2009).

    Args:
        scratch: an empty folder, for the download.

    Raises:
        UnreachableError: the download fails.
    """
    try:
        with _downloading(CIFAR10.url):
            parts = {"train": CIFAR10(scratch, True, download=True), "val": CIFAR10(scratch, False)}
    except _UnavailableError as error:
        raise UnreachableError(
            f"CIFAR-10 cannot be had: {error}; `fashion-mnist` has other sources, and `shapes` needs none"
        ) from None
    return {split: Split(part.data, np.array(part.targets), tuple(part.classes)) for split, part in parts.items()}


def imagenette(source: Path | None, scratch: Path) -> Path:
    """Imagenette (J. Howard, fast.ai): a folder with train/CLASS/IMAGE and val/CLASS/IMAGE.

    Args:
        source: its archive, imagenette2-320.tgz; None: downloaded.
        scratch: an empty folder.

    Raises:
        UnreachableError: it cannot be had.
        UserError: it is damaged.
    """
    try:
        if source is None:
            with _downloading("imagenette2-320.tgz"):
                Imagenette(scratch, size="320px", download=True)
        else:
            if source.exists() and not source.is_file():  # a pipe would be waited for
                raise ValueError("it is no file")
            shutil.unpack_archive(source, scratch, filter="data")  # nothing outside of scratch
        return next(path.parent for path in scratch.glob("*/train"))
    except _UnavailableError as error:
        raise UnreachableError(
            f"Imagenette cannot be had: {error}; give its archive by --source, or use `shapes`"
        ) from None
    except (OSError, ValueError, EOFError, zlib.error, tarfile.TarError, StopIteration) as error:
        if isinstance(error, OSError) and error.errno:
            text = f"{source} cannot be unpacked into {scratch}: {(error.strerror or '').lower()}"
            raise file_error(text, error) from error
        raise UserError(f"{source} is not Imagenette's archive, or damaged: {error!r}") from error


def _fashion_mnist_folder(source: Path | None, scratch: Path) -> Path:
    """A folder with the four gzipped files."""
    names = [name for pair in FASHION_MNIST_FILES.values() for name in pair]
    if source is not None:
        missing = [name for name in names if not (source / name).is_file()]
        if missing:
            raise UserError(f"--source {source} lacks {', '.join(missing)}")
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
    raise UnreachableError(
        f"Fashion-MNIST cannot be had: {'; '.join(reasons)}. Give --source, a folder with {', '.join(names)}, "
        "or prepare `shapes`, which is generated"
    )


def _download_fashion_mnist(scratch: Path) -> Path:
    for name, md5 in FashionMNIST.resources:
        url = FashionMNIST.mirrors[0] + name
        with _downloading(url):
            download_url(url, scratch, md5=md5)
    return scratch


def _fetch_debian_package(scratch: Path) -> Path:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise _UnavailableError("there is no apt-get for Debian's package of it")
    print(f"fetching Debian's package {DEBIAN_PACKAGE}", flush=True)
    timeouts = [f"-oAcquire::{protocol}::Timeout={SILENCE_SECONDS}" for protocol in ("http", "https")]
    _run(["apt-get", "-qq", "-oAcquire::Retries=0", *timeouts, "download", DEBIAN_PACKAGE], scratch)
    _run(["dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), "debian"], scratch)
    return scratch / "debian" / DEBIAN_FOLDER


def _run(command: list[str], cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise _UnavailableError(f"{command[0]} failed ({last})") from error


@contextlib.contextmanager
def _downloading(url: str) -> Iterator[None]:
    """Says that it downloads, and gives up on a server that is silent."""
    print(f"downloading {url}", flush=True)
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    except (RuntimeError, OSError) as error:  # RuntimeError: torchvision's for a broken or forged download
        if getattr(error, "errno", None) in OF_A_DISK:
            raise
        raise _UnavailableError(f"{url} cannot be downloaded ({getattr(error, 'reason', error)})") from error
    finally:
        socket.setdefaulttimeout(previous)


def _read_idx(path: Path, num_dims: int) -> NDArray[np.uint8]:
    """An idx file of bytes: big-endian 32-bit magic number and sizes, then the data."""
    try:
        content = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise file_error(f"{path} cannot be read: {error}", error) from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    header = 4 * (1 + num_dims)
    magic, *shape = np.frombuffer(content[:header].ljust(header, b"\0"), dtype=">i4").tolist()
    if magic != 8 << 8 | num_dims or len(content) != header + int(np.prod(shape)):
        raise UserError(f"{path} is damaged: not an idx file of bytes in {num_dims} dimension(s), or not all of one")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
