"""Data sets on disk: complete or not there at all, what is damaged is named, and a second call does nothing."""

import functools
import gzip
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moco_dist.data import index
from moco_dist.data.decode import decode_image
from moco_dist.data.sources import find_images
from moco_dist.datasets import prepare, published
from moco_dist.datasets.prepare import prepare_cifar10, prepare_fashion_mnist, prepare_imagefolder, prepare_shapes
from moco_dist.datasets.shapes import SHAPES, ShapeSettings
from moco_dist.errors import UnreachableError, UserError

NUM_TRAIN, NUM_VAL = 200, 30


def idx(array):
    """The array as a gzipped idx file, as the format's published description has it."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def source(tmp_path):
    """A folder with small idx files under Fashion-MNIST's names; every image's pixels are its label x 20."""
    folder = tmp_path / "source"
    folder.mkdir()
    for (images_file, labels_file), count in zip(
        published.FASHION_MNIST_FILES.values(), (NUM_TRAIN, NUM_VAL), strict=True
    ):
        labels = (np.arange(count) * 7 % 10).astype(np.uint8)
        images = np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28)).astype(np.uint8)
        (folder / images_file).write_bytes(idx(images))
        (folder / labels_file).write_bytes(idx(labels))
    return folder


def visible_and_hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_fashion_mnist_from_idx_files(tmp_path, source, capsys):
    out = prepare_fashion_mnist(tmp_path / "fm", source)
    assert capsys.readouterr().out == f"{out} is ready: fashion-mnist, 200 train + 30 val images\n"
    assert visible_and_hidden(tmp_path) == {"source", "fm"}
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        folder = find_images(out, split)
        assert folder.classes == published.FASHION_MNIST_CLASSES
        assert len(folder.paths) == count
        for path, label in zip(folder.paths, folder.labels, strict=True):
            number = int(Path(path).stem)
            assert label == number * 7 % 10
            assert (np.asarray(Image.open(folder.root / path).convert("RGB")) == 20 * label).all()


def test_a_second_call_finds_it_and_does_nothing(tmp_path, source, capsys):
    out = prepare_fashion_mnist(tmp_path / "fm", source)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    prepare_fashion_mnist(out, tmp_path / "no such folder")
    assert "is already there: fashion-mnist, 200 train + 30 val" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def rewrite(change):
    """Damage that changes what is in the gzipped file, not the gzip around it."""
    return lambda content: gzip.compress(change(gzip.decompress(content)))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda content: content[:-100], "cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda content: content[:50] + b"\x00" * 8 + content[58:], "cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda content: b"<html>", "cannot be read"),
        ("train-images-idx3-ubyte.gz", rewrite(lambda content: content[:-1]), "is damaged"),
        ("train-images-idx3-ubyte.gz", rewrite(lambda content: content + b"0"), "is damaged"),
        ("train-images-idx3-ubyte.gz", rewrite(lambda content: content[:6]), "is damaged"),
        ("train-images-idx3-ubyte.gz", rewrite(lambda content: b""), "is damaged"),
        ("t10k-labels-idx1-ubyte.gz", rewrite(lambda content: b"\0\0\x0d\x01" + content[4:]), "is damaged"),
        ("t10k-labels-idx1-ubyte.gz", lambda content: idx(np.zeros(29, np.uint8)), "does not hold the labels of"),
        ("t10k-labels-idx1-ubyte.gz", lambda content: idx(np.full(30, 10, np.uint8)), "does not hold the labels of"),
    ],
)
def test_a_damaged_idx_file_is_named_and_leaves_nothing(tmp_path, source, file, damage, message):
    (source / file).write_bytes(damage((source / file).read_bytes()))
    with pytest.raises(UserError, match=f"{file} {message}"):
        prepare_fashion_mnist(tmp_path / "fm", source)
    assert visible_and_hidden(tmp_path) == {"source"}


def test_missing_idx_files_are_named(tmp_path, source):
    (source / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="lacks t10k-labels-idx1-ubyte.gz$"):
        prepare_fashion_mnist(tmp_path / "fm", source)


def test_without_any_source_every_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "DEBIAN_FOLDER", Path("no/such/folder"))
    monkeypatch.setattr(published.FashionMNIST, "mirrors", [f"file://{tmp_path}/mirror/"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnreachableError) as caught:
        prepare_fashion_mnist(tmp_path / "fm")
    for part in (
        f"{tmp_path}/mirror/train-images-idx3-ubyte.gz cannot be downloaded",
        "no apt-get",
        "--source",
        "`shapes`",
    ):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert visible_and_hidden(tmp_path) == set()


@pytest.fixture
def mirror(source):
    """The address of a web server on this machine that has the files of `source`."""
    handler = functools.partial(_QuietHandler, directory=source)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_download_is_used_and_one_with_another_checksum_is_not(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(published, "DEBIAN_FOLDER", Path("no/such/folder"))
    monkeypatch.setattr(published.FashionMNIST, "mirrors", [mirror])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="cannot be downloaded .*corrupted"):
        prepare_fashion_mnist(tmp_path / "fm")
    names = [name for name, _ in published.FashionMNIST.resources]
    monkeypatch.setattr(published.FashionMNIST, "resources", [(name, None) for name in names])
    prepare_fashion_mnist(tmp_path / "fm")
    assert len(find_images(tmp_path / "fm", "val").paths) == NUM_VAL


def test_cifar10_has_its_colours_and_classes(tmp_path, monkeypatch):
    class Downloaded:
        url = "its url"

        def __init__(self, root, train, download=False):
            count = 20 if train else 10
            self.targets = [i % 2 for i in range(count)]
            self.data = np.array([[[[10 * t, 20, 30]] * 32] * 32 for t in self.targets], dtype=np.uint8)
            self.classes = ["airplane", "automobile"]

    monkeypatch.setattr(published, "CIFAR10", Downloaded)
    folder = find_images(prepare_cifar10(tmp_path / "c10"), "train")
    assert (folder.classes, len(folder.paths)) == (("airplane", "automobile"), 20)
    assert Image.open(folder.root / "automobile/00001.png").getpixel((0, 0)) == (10, 20, 30)


def test_cifar10_that_cannot_be_downloaded_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(published.CIFAR10, "url", f"file://{tmp_path}/nothing.tar.gz")
    with pytest.raises(UnreachableError, match=r"CIFAR-10 cannot be had: .*nothing\.tar\.gz cannot be downloaded"):
        prepare_cifar10(tmp_path / "c10")
    assert visible_and_hidden(tmp_path) == set()


def test_shapes_are_the_same_files_every_time(tmp_path):
    first, second, other = (
        prepare_shapes(tmp_path / name, seed, num_train=20, num_val=10) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    files = {path.relative_to(first): path.read_bytes() for path in sorted(first.rglob("*.jpg"))}
    assert files == {path.relative_to(second): path.read_bytes() for path in second.rglob("*.jpg")}
    assert not set(files.values()) & {path.read_bytes() for path in other.rglob("*.jpg")}
    assert len(set(files.values())) == 30  # no image of train is also in val
    train = find_images(first, "train")
    assert train.classes == tuple(SHAPES)
    assert np.bincount(train.labels).tolist() == [2] * 10


def test_other_parameters_are_refused_and_named(tmp_path):
    out = prepare_shapes(tmp_path / "s", num_train=20, num_val=10)
    with pytest.raises(UserError, match=r"s was prepared with seed 0, num_train 20; remove it"):
        prepare_shapes(out, seed=1, num_train=30, num_val=10)
    with pytest.raises(UserError, match=r"was prepared with noise [\d.]+; remove it"):
        prepare_shapes(out, num_train=20, num_val=10, settings=ShapeSettings(noise=0.5))
    with pytest.raises(UserError, match=r"was prepared as shapes; "):
        prepare_fashion_mnist(out, tmp_path)


def test_a_data_set_that_lost_images_is_named(tmp_path):
    out = prepare_shapes(tmp_path / "s", num_train=20, num_val=10)
    find = find_images(out, "train")
    (find.root / find.paths[0]).unlink()
    with pytest.raises(UserError, match=r"is damaged: it has 19 train \+ 10 val images of 20 train"):
        prepare_shapes(out, num_train=20, num_val=10)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '"images"'])
def test_somebody_else_s_dataset_json_is_left_alone(tmp_path, text):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "dataset.json").write_text(text)
    with pytest.raises(UserError, match="s exists and is not a prepared data set; remove it"):
        prepare_shapes(tmp_path / "s")


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_filled(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(UserError, match=f"{name} exists and is not a prepared data set"):
            prepare_shapes(tmp_path / name)
    (tmp_path / "empty").mkdir()
    prepare_shapes(tmp_path / "empty", num_train=10, num_val=10)
    assert len(find_images(tmp_path / "empty", "train").paths) == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_interrupted_it_leaves_nothing(tmp_path, monkeypatch, error):
    drawn = []

    def draw(label, rng, settings):
        drawn.append(label)
        if len(drawn) == 150:
            raise error
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(prepare, "draw_image", draw)
    expected = UserError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        prepare_shapes(tmp_path / "deep" / "s", num_train=100_000)
    assert len(drawn) < 2000  # the rest was not drawn first
    assert visible_and_hidden(tmp_path / "deep") == set()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_command_told_to_end_leaves_nothing(tmp_path, signum):
    words = [sys.executable, "-m", "moco_dist", "data", "prepare", "shapes", "--out", str(tmp_path / "s")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not list(tmp_path.glob(".s.partial-*/train/*/*.jpg")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signum)
        output, errors = process.communicate()
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
    assert visible_and_hidden(tmp_path) == set()


@pytest.fixture
def photos(tmp_path):
    """SOURCE/CLASS/IMAGE with what people have: seven images of all sorts, five files that are none."""
    root = tmp_path / "photos"
    (root / "cat" / "2024").mkdir(parents=True)
    (root / "dog").mkdir()
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp[::-1], ramp], axis=2))
    image.save(root / "cat" / "ok.jpg", quality=95)
    image.convert("CMYK").save(root / "cat" / "cmyk.jpg", quality=95)
    image.save(root / "cat" / "2024" / "png called.JPG", format="PNG")
    image.convert("L").save(root / "dog" / "gray.jpg")
    image.convert("RGBA").save(root / "dog" / "transparent.webp")
    Image.fromarray(ramp.astype(np.uint16) * 256 + 77).save(root / "dog" / "bits16.png")
    Image.new("RGB", (1, 1)).save(root / "dog" / "dot.bmp")
    content = (root / "cat" / "ok.jpg").read_bytes()
    (root / "cat" / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (root / "dog" / "empty.jpg").touch()
    (root / "dog" / "html.jpg").write_text("<html>404</html>")
    (root / "dog" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    Image.fromarray(ramp.astype(np.float32)).save(root / "dog" / "float.tif")
    (root / "dog" / "notes.txt").touch()
    return SimpleNamespace(root=root, ramp=ramp, image=np.asarray(image))


def test_imagefolder_links_what_can_be_read_and_lists_the_rest(tmp_path, photos, capsys):
    before = sorted(photos.root.rglob("*"))
    out = prepare_imagefolder(tmp_path / "out", photos.root)
    message = f"{out} is ready: imagefolder, 7 train images; 5 unreadable, see {out / 'unreadable.txt'}\n"
    assert capsys.readouterr() == (message, "")
    folder = find_images(out, "train")
    assert folder.classes == ("cat", "dog")
    assert folder.paths == [
        "cat/2024/png called.JPG",
        "cat/cmyk.jpg",
        "cat/ok.jpg",
        "dog/bits16.png",
        "dog/dot.bmp",
        "dog/gray.jpg",
        "dog/transparent.webp",
    ]
    listed = (out / "unreadable.txt").read_text().splitlines()
    assert [line.partition(f"{photos.root}/")[2].partition(":")[0] for line in listed] == [
        "cat/truncated.jpg",
        "dog/empty.jpg",
        "dog/float.tif",
        "dog/html.jpg",
        "dog/link.jpg",
    ]
    assert listed[1].endswith("dog/empty.jpg: the file is empty")
    assert sorted(photos.root.rglob("*")) == before
    prepare_imagefolder(out, photos.root)
    assert "is already there" in capsys.readouterr().out


def test_all_sorts_of_images_have_their_colours(tmp_path, photos):
    out = prepare_imagefolder(tmp_path / "out", photos.root)

    def pixels(path):
        return np.asarray(decode_image((out / "train" / path).read_bytes(), path)).astype(int)

    assert np.array_equal(pixels("cat/2024/png called.JPG"), photos.image)
    assert np.array_equal(pixels("dog/transparent.webp").shape, photos.image.shape)
    assert np.abs(pixels("cat/ok.jpg") - photos.image).mean() < 3
    assert np.abs(pixels("cat/cmyk.jpg") - photos.image).mean() < 3
    assert np.array_equal(pixels("dog/bits16.png"), np.stack([photos.ramp] * 3, axis=2))  # not cut off at 255


def test_imagefolder_keeps_train_and_val(tmp_path, photos):
    (photos.root / "train").mkdir()
    (photos.root / "cat").rename(photos.root / "train" / "cat")
    (photos.root / "dog").rename(photos.root / "train" / "dog")
    (photos.root / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(photos.root / "val" / "cat" / "1.png")
    out = prepare_imagefolder(tmp_path / "out", photos.root)
    assert find_images(out, "val").paths == ["cat/1.png"]
    assert len(find_images(out, "train").paths) == 7


def test_imagefolder_of_a_source_that_has_grown_is_not_passed_off_as_checked(tmp_path, photos):
    out = prepare_imagefolder(tmp_path / "out", photos.root)
    Image.new("RGB", (9, 9)).save(photos.root / "cat" / "new.png")
    with pytest.raises(UserError, match="was prepared with train_files 12; remove it"):
        prepare_imagefolder(out, photos.root)


def test_imagefolder_without_one_good_image_says_so(tmp_path):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.jpg").touch()
    with pytest.raises(UserError, match=r"none of the 1 files in .*in can be read; .*1\.jpg: the file is empty"):
        prepare_imagefolder(tmp_path / "out", tmp_path / "in")
    assert visible_and_hidden(tmp_path) == {"in"}


def test_imagefolder_does_not_write_into_its_source(tmp_path, photos, monkeypatch):
    before = visible_and_hidden(photos.root)
    minute_ago = time.time() - 60
    for folder in (photos.root, *(path for path in photos.root.rglob("*") if path.is_dir())):
        os.utime(folder, (minute_ago, minute_ago))
    monkeypatch.setattr(index, "MIN_IMAGES", 1)  # elsewhere, this writes an index
    prepare_imagefolder(tmp_path / "first", photos.root)
    assert visible_and_hidden(photos.root) == before
    with pytest.raises(UserError, match="lies in its source"):
        prepare_imagefolder(photos.root / "out", photos.root)
    with pytest.raises(UserError, match="photoss is not a folder; did you mean photos"):
        prepare_imagefolder(tmp_path / "out", tmp_path / "photoss")


def test_what_out_holds_is_written_down(tmp_path):
    out = prepare_shapes(tmp_path / "s", seed=3, num_train=20, num_val=10)
    facts = json.loads((out / "dataset.json").read_text())
    assert (facts["name"], facts["seed"], facts["images"]) == ("shapes", 3, {"train": 20, "val": 10})
