"""Tar shards and packed files in an object store: found, indexed and read as on a disk."""

import json
import multiprocessing
import os

import numpy as np
import pytest

from moco_dist.cli.main import main
from moco_dist.config.address import Url
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.images import MissingDataError
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.remote import source, store, window
from moco_dist.data.remote.source import RemoteImages, joined_ranges
from moco_dist.data.sources import bytes_reader, find_images, find_splits
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError, UserError
from tests.stores import running_store
from tests.tars import files_of, with_labels, write_tar
from tests.unit.loaders import picture

pytestmark = pytest.mark.slow
COUNT = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of images and, made of it, what is put into the store."""
    top = tmp_path_factory.mktemp("remote")
    for i in range(COUNT):
        path = top / "folder" / ("val" if i % 4 == 3 else "train") / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 40 + i, 50).save(path)
    for name in ("b/21.jpg", "a/22.jpg"):
        (top / "folder" / "val" / name).parent.mkdir(exist_ok=True)
        picture(40, 40, 50).save(top / "folder" / "val" / name)
    train, val = (files_of(top / "folder" / split) for split in ("train", "val"))
    for i in range(2):
        write_tar(top / "flat" / f"x-train-{i}.tar", train[i::2])
        write_tar(top / "split" / "train" / f"{i}.tar", with_labels(train)[i * 18 : i * 18 + 18])
    write_tar(top / "flat" / "x-val-0.tar", val)
    write_tar(top / "split" / "validation" / "0.tar", with_labels(val))
    (top / "split" / "classes.txt").write_text("a\nb\n")
    pack(top / "folder", top / "x.beton")
    return top


@pytest.fixture(scope="module")
def server(made):
    with running_store() as running:
        running.put("set")
        for name in ("flat", "split"):
            running.put_folder(made / name, f"set/{name}")
        running.put("set/x.beton", (made / "x.beton").read_bytes())
        running.put("set/images/a/1.jpg", b"x")
        running.put("set/packed/train-0.tar.gz", b"x")
        yield running


@pytest.fixture(autouse=True)
def environment(server, monkeypatch):
    """Where the store is."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def in_a_child(ask):
    """`ask()` in a process of its own: this one starts others that use obstore, so it may not use it itself."""

    def work():
        try:
            there.send((ask(), None))
        except BaseException as error:
            there.send((None, error))

    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    assert here.poll(60)
    child.join()
    found, error = here.recv()
    if error is not None:
        raise error
    return found


def never(*_):
    raise AssertionError("headers are read")


def contents(folder):
    read = bytes_reader(folder)
    return [bytes(read(i)[0]) for i in range(len(folder.paths))]


@pytest.mark.parametrize(
    ("root", "local"),
    [
        ("s3://set/flat", "flat"), ("s3://set/flat/x-train-{0..1}.tar", "flat"), ("s3://set/split", "split"),
        ("s3://set/x.beton", "x.beton"), ("HTTP/set/flat/{x-train-{0..1},x-val-0}.tar", "flat"),
        ("HTTP/set/x.beton", "x.beton"),
    ],
)  # fmt: skip
def test_what_lies_in_a_store_is_what_lies_on_a_disk(made, server, root, local):
    url, folder = Url(root.replace("HTTP", server.url)), find_splits(made / "folder")
    found, on_disk = find_splits(url), find_splits(made / local)
    assert list(found) == ["train", "val"]
    for split, ours in found.items():
        assert (ours.list_hash, ours.classes) == (on_disk[split].list_hash, on_disk[split].classes)
        assert ours.content_hash == folder[split].content_hash
        assert ours.labels.tolist() == folder[split].labels.tolist()
        read = bytes_reader(folder[split])
        assert in_a_child(lambda: contents(ours)) == [read(i)[0] for i in range(len(ours.paths))]  # noqa: B023
    assert not store.is_used_here()


def test_an_index_is_believed_as_long_as_the_store_says_the_same(made, server, tmp_path, monkeypatch, capsys):
    server.put_folder(made / "flat", "set/index")
    root, index = Url("s3://set/index"), tmp_path / "index"
    first = find_images(root, "train", index_folder=index)

    with monkeypatch.context() as patch:
        patch.setattr("moco_dist.data.remote.index.read_open_shard", never)
        assert find_images(root, "train", index_folder=index).list_hash == first.list_hash
    # As large as before, and of other bytes: only the entity tag tells.
    shard = (made / "flat" / "x-train-0.tar").read_bytes()
    server.put("set/index/x-train-0.tar", shard.replace(b"ustar", b"USTAR", 1))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"x-train-0\.tar"):
        find_images(root, "train", index_folder=index)
    assert capsys.readouterr().err == (
        "warning: s3://set/index/x-train-0.tar has changed since this run was last started (1 of 3 shards have); its "
        "images are listed anew\n"
    )


def test_a_packed_file_that_has_changed_between_runs_is_named(made, server, tmp_path, capsys):
    packed, root = (made / "x.beton").read_bytes(), Url("s3://set/again.beton")
    server.put("set/again.beton", packed)
    first = find_images(root, "train", index_folder=tmp_path)
    find_images(root, "val", index_folder=tmp_path)
    assert capsys.readouterr().err == ""
    server.put("set/again.beton", packed.replace(b"JFIF", b"JFIX", 1))  # the list of images stays
    assert find_images(root, "train", index_folder=tmp_path).list_hash == first.list_hash
    find_images(root, "val", index_folder=tmp_path)
    assert capsys.readouterr().err == (
        f"warning: {root} has changed since this run was last started; its images are listed anew\n"
    )


@pytest.mark.parametrize("made_of", ["disk", "store"])
def test_an_index_beside_the_shards_saves_the_headers(made, server, tmp_path, monkeypatch, capsys, made_of):
    place = f"set/beside-{made_of}"
    server.put_folder(made / "split", place)
    root = str(made / "split") if made_of == "disk" else f"s3://{place}"
    assert main(["data", "index", root, "--out", str(tmp_path / "x.idx")]) == 0
    assert f"x.idx is ready: {COUNT + 2} images; as moco_dist.idx beside the shards" in capsys.readouterr().out
    before = {split: folder.list_hash for split, folder in find_splits(Url(f"s3://{place}")).items()}
    server.put(f"{place}/moco_dist.idx", (tmp_path / "x.idx").read_bytes())

    local = contents(find_images(made / "split", "train"))
    with monkeypatch.context() as patch:
        patch.setattr("moco_dist.data.remote.index.read_open_shard", never)
        for folder in (None, tmp_path / "kept"):
            found = find_images(Url(f"s3://{place}"), "train", index_folder=folder)
            assert found.list_hash == before["train"]
            assert in_a_child(lambda: contents(found)) == local  # noqa: B023
    server.put(f"{place}/train/2.tar", (made / "flat" / "x-train-0.tar").read_bytes())
    assert len(find_images(Url(f"s3://{place}"), "train").paths) > len(found.paths)
    assert "moco_dist.idx is of other shards than lie beside it" in capsys.readouterr().err


def test_an_index_fits_its_shards_in_whatever_order_they_are_named(made, server, tmp_path, monkeypatch):
    server.put_folder(made / "flat", "set/order")
    assert main(["data", "index", str(made / "flat"), "--out", str(tmp_path / "x.idx")]) == 0
    server.put("set/order/moco_dist.idx", (tmp_path / "x.idx").read_bytes())
    monkeypatch.setattr("moco_dist.data.remote.index.read_open_shard", never)
    found = find_images(Url("s3://set/order/{x-train-1,x-train-0,x-val-0}.tar"), "train")
    assert in_a_child(lambda: contents(found)) == contents(find_images(made / "flat", "train"))


def test_ranges_of_a_batch_are_joined():
    file = np.array([0, 0, 0, 1, 0, 0], np.int32)
    offset = np.array([1000, 0, 500, 0, 10_000_000, 10_000_000 + source.MOST_JOINED_BYTES - 100], np.int64)
    size = np.array([100, 100, 100, 100, 100, 200], np.int64)
    parts = joined_ranges([5, 0, 1, 2, 3, 4], file, offset, size)
    assert [part.samples for part in parts] == [[5], [1, 2, 0], [3], [4]]  # in the order in which they are needed
    far = 10_000_000 + source.MOST_JOINED_BYTES - 100
    assert [part[:3] for part in parts] == [(0, far, far + 200), (0, 0, 1100), (1, 0, 100), (0, 10_000_000, 10_000_100)]


def test_announced_images_take_few_requests(made, monkeypatch):
    found = find_images(Url("s3://set/flat"), "train")

    def requests():
        calls = []
        monkeypatch.setattr(source, "read_range", lambda *args: calls.append(args) or store.read_range(*args))
        images = RemoteImages(found)
        images.announce(np.arange(10))
        images.announce(np.arange(8, 14))  # two of them are on their way
        data = [bytes(images.content(i)[0]) for i in range(14)]
        again = bytes(images.content(0)[0])
        return len(calls), data == contents(find_images(made / "flat", "train"))[:14], again == data[0]

    count, same, again = in_a_child(requests)
    assert same and again
    assert count <= 6  # two shards: their neighbours are one request each, and one for what is asked twice


def test_what_was_announced_in_vain_is_dropped():
    images = RemoteImages(find_images(Url("s3://set/flat"), "train"))

    def left():
        for first in range(0, 12, 2):
            images.announce(np.arange(first, first + 2))
        return sorted(images._coming)

    assert in_a_child(left) == list(range(6, 12))


def batches(root, num_workers, loader="torchvision"):
    config = PretrainConfig.model_validate(
        {"run": {"dir": "unused"}, "optim": {"global_batch_size": 8}, "model": {"bn_group_size": 4},
         "data": {"root": root, "image_size": 16, "num_workers": num_workers, "loader": loader}}
    )  # fmt: skip
    folder = find_images(config.data.root, "train")
    return [batch.view_q for batch in pretrain_batches(folder, config, Plan(16, 8, 0), World(), 0, 4)]


def test_every_worker_has_a_store_of_its_own(made):
    """Workers are forked, and threads of obstore are not: a store of the rank's would be waited for for ever."""
    local = batches(made / "flat", 0)
    for num_workers in (1, 2):
        ours = batches("s3://set/flat", num_workers)
        assert all(map(np.array_equal, ours, local))
        assert not store.is_used_here()
    assert all(map(np.array_equal, batches("s3://set/x.beton", 2, "ffcv"), local))


def test_a_process_that_has_read_itself_starts_no_workers(made):
    def both():
        first, second = batches("s3://set/flat", 0), batches("s3://set/flat", 2)
        return store.is_used_here(), all(map(np.array_equal, first, second))

    assert in_a_child(both) == (True, True)


def test_a_store_that_has_changed_since_is_told(made, server):
    server.put_folder(made / "flat", "set/changed")
    found = find_images(Url("s3://set/changed"), "train")
    server.put("set/changed/x-train-0.tar", (made / "flat" / "x-train-0.tar").read_bytes()[:-512] + b"\0" * 511 + b"x")
    with pytest.raises(UserError, match=r"has changed since its images were listed; start again"):
        store.apart(lambda: contents(found))


def test_a_shard_that_is_gone_ends_the_reading(made, server):
    server.put_folder(made / "flat", "set/gone")
    found = find_images(Url("s3://set/gone"), "train")
    server.delete("set/gone/x-train-1.tar")
    with pytest.raises(InfrastructureError, match=r"in s3://set/gone/x-train-1\.tar: there is no such object"):
        store.apart(lambda: contents(found))


def test_windows_grow_where_a_reader_goes_on(server):
    url = Url("s3://set/window")
    content = os.urandom(300_000)
    server.put("set/window", content)

    def read():
        calls = []
        window.read_range = lambda *args: calls.append(args[2]) or store.read_range(*args)
        file = window.WindowFile(url, store.look_at(url))
        parts = [file.read(1000) for _ in range(300)]
        jumps = []
        for at in (0, 100_000, 200_000, 299_990):
            file.seek(at)
            jumps.append(file.read(20))
        return (
            b"".join(parts) == content,
            jumps == [content[at : at + 20] for at in (0, 100_000, 200_000, 299_990)],
            calls,
        )

    same, jumps, calls = in_a_child(read)
    assert same and jumps
    assert len(calls) < 12 and max(calls) > 4 * window.SMALLEST


def test_commands_read_a_store(made, server, tmp_path, capsys):
    """Each in a process of its own, as a user starts it."""

    def of(*words):
        return in_a_child(lambda: main(list(words)))

    for root in ("s3://set/flat", "s3://set/x.beton"):
        assert of("data", "verify", root) == 0
    assert of("data", "pack", "s3://set/flat", str(tmp_path / "y.beton")) == 0
    assert find_images(tmp_path / "y.beton", "val").list_hash == find_images(made / "flat", "val").list_hash
    out = tmp_path / "views.png"
    assert of("data", "views", "--out", str(out), "--data.root", "s3://set/flat", "--run.dir", "unused",
              "--data.image-size", "32", "--count", "2") == 0  # fmt: skip
    assert out.is_file()


def test_pixels_are_read_from_disks_alone(made, server, tmp_path):
    server.put("set/raw.beton", pack(made / "folder", tmp_path / "raw.beton", raw_share=1).read_bytes())
    with pytest.raises(UserError, match="has images as pixels, which are read from disks alone"):
        find_images(Url("s3://set/raw.beton"), "train")


@pytest.mark.parametrize(
    ("root", "kind", "says"),
    [
        ("s3://nobucket/flat", MissingDataError, "there is no bucket s3://nobucket"),
        ("s3://set/flatt", MissingDataError, r"nothing lies there; did you mean flat\?"),
        ("s3://set/flat/x-train-7.tar", MissingDataError, r"does not exist; did you mean x-train-1\.tar\?"),
        ("s3://set/flat/x-train-{0..3}.tar", MissingDataError, "x-train-2.tar is missing: 2 of the 4 shards"),
        ("s3://set/images", MissingDataError, "has no tar shards .*; images one by one are not read from an address"),
        ("s3://set/packed", UserError, r"train-0\.tar\.gz is compressed"),
        ("s3://set/flat/*.tar", UserError, r"\* is no pattern here; name the folder"),
        ("HTTP/set/flat", UserError, "a web server does not say what lies on it; name a shard"),
        ("HTTP/set/none.beton", MissingDataError, r"none\.beton cannot be read: there is no such object"),
    ],
)
def test_what_is_not_there(server, root, kind, says):
    with pytest.raises(kind, match=says):
        find_images(Url(root.replace("HTTP", server.url)), "train")


def test_the_index_says_nothing_of_credentials(made, tmp_path):
    find_images(Url("s3://set/flat"), "train", index_folder=tmp_path)
    (index,) = tmp_path.iterdir()
    text = index.read_bytes()
    assert b"a-secret-of-tests" not in text and b"tester" not in text
    assert json.loads(text.split(b"\n")[1])["lists"]["classes"] == ["a", "b"]
