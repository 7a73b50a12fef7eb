"""Data that people get wrong, in each format, by the real command: one line that names it and what to do."""

import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from moco_dist.cli.main import main
from moco_dist.datasets.pack import pack
from tests.faults.processes import TINY
from tests.integration.bad_data import FOLDER, PACKED, PARQUET, REMOTE
from tests.integration.bad_tars import TAR
from tests.parquets import write_parquet
from tests.stores import store_of_this_process
from tests.tars import files_of, write_tar

pytestmark = pytest.mark.slow


def fails(words, says, capsys, status=2):
    """That a command ends with this status and one line."""
    capsys.readouterr()
    found = main(words)
    error = capsys.readouterr().err
    assert (found, len(error.splitlines())) == (status, 1), error
    assert re.search(says, error), error
    assert re.match(r"(\[rank \d+\] )?error: ", error)


def pretrain(root, rest, tmp_path):
    """The words of a training; `rest` follows the root, and flags follow a space in it."""
    rest, *flags = rest.split(" ") if " " in rest else (rest,)
    return ["pretrain", "--data.root", f"{root}{rest}", "--run.dir", str(tmp_path / "run"), *TINY, *filter(None, flags)]


@pytest.mark.parametrize("case", TAR)
def test_tar_shards(tiny_data, capsys, tmp_path, case):
    make, says, rest = TAR[case]
    root = tmp_path / "shards"
    root.mkdir()
    make(root, files_of(tiny_data / "train"))
    fails(pretrain(root, rest, tmp_path), says, capsys)
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize("case", PACKED)
def test_packed_files(tiny_data, capsys, tmp_path, case):
    make, says, rest = PACKED[case]
    make(tmp_path, tiny_data)
    loader = () if "torchvision" in says else ("--data.loader", "ffcv")
    fails([*pretrain(tmp_path, rest, tmp_path), *loader], says, capsys)


@pytest.mark.parametrize("case", FOLDER)
def test_folders(tiny_data, capsys, tmp_path, case):
    make, says, rest = FOLDER[case]
    root = tmp_path / "data"
    root.mkdir()
    make(root, tiny_data)
    fails(pretrain(root, rest, tmp_path), says, capsys)


@pytest.mark.parametrize("case", PARQUET)
def test_parquet(tiny_data, capsys, tmp_path, case):
    make, says, flags = PARQUET[case]
    root, out = tmp_path / "data", tmp_path / "out" / "x.beton"
    root.mkdir()
    make(root, [(content, name.rpartition("/")[2]) for name, content in files_of(tiny_data / "train")[:6]])
    fails(["data", "pack", str(root), str(out), *flags.split()], says, capsys)
    assert not list(out.parent.glob("*"))


@pytest.fixture(scope="module")
def store(tiny_data, tmp_path_factory):
    """A store with things in it that are no data set."""
    top = tmp_path_factory.mktemp("store")
    files = files_of(tiny_data / "train")
    for number in (0, 2):
        write_tar(top / "tars" / f"train-{number}.tar", files[number::2])
    whole = write_tar(top / "cut" / "train-0.tar", files)
    whole.write_bytes(whole.read_bytes()[:9_999])
    (top / "packed").mkdir()
    (top / "packed" / "train-0.tar.gz").write_bytes(b"gz")
    (top / "none.beton").write_bytes(b"text" * 5_000)
    write_tar(top / "images" / "x.tar", []).rename(top / "images" / "x.jpg")
    write_parquet(top / "parquet" / "train.parquet", [(files[0][1], "0.jpg")], [0], ["a"])
    with store_of_this_process() as running:
        running.put("set")
        running.put_folder(top, "set")
        yield running


@pytest.fixture(scope="module")
def web():
    """The address of a server that has a page for a tar file, and gives no part of it."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            page = b"<html>welcome</html>" * 100
            self.send_response(200 if self.path.endswith(".tar") else 404)
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(page)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("case", REMOTE)
def test_addresses(store, web, capsys, tmp_path, monkeypatch, case):
    monkeypatch.setattr("moco_dist.data.remote.store.FIRST_WAITS_SECONDS", ())
    root, says, status = REMOTE[case]
    root = root.replace("HTTP", store.url).replace("WEB", web)
    fails(pretrain(root, "", tmp_path), says, capsys, status)


def test_a_server_of_another_protocol(store, web, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("moco_dist.data.remote.store.FIRST_WAITS_SECONDS", ())
    monkeypatch.setenv("AWS_ENDPOINT_URL", web)
    fails(pretrain("s3://set/tars", "", tmp_path), "s3://set/tars cannot be read: 404 Not Found", capsys, 74)


@pytest.mark.parametrize("change", [lambda content: content[:-9], lambda content: b"text", None])
def test_an_index_that_is_damaged_or_of_other_shards(store, tiny_data, tmp_path, change):
    """It is said, and headers are read."""
    write_tar(tmp_path / "a" / "train-0.tar", files_of(tiny_data / "train")[:9])
    write_tar(tmp_path / "b" / "train-0.tar", files_of(tiny_data / "train"))
    place = f"set/{'other' if change is None else change(bytes(20)).hex()}"
    store.put_folder(tmp_path / "b", place)
    assert main(["data", "index", str(tmp_path / ("a" if change is None else "b")), "--out", str(tmp_path / "x")]) == 0
    content = (tmp_path / "x").read_bytes()
    store.put(f"{place}/moco_dist.idx", change(content) if change else content)
    # In a process of its own: one that has used obstore cannot be forked, and other tests fork this one.
    words = [sys.executable, "-m", "moco_dist", "data", "verify", f"s3://{place}"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1 and "moco_dist.idx is of other shards than lie beside it" in done.stderr
    assert "80 train images" in done.stdout


def test_labels_that_some_images_lack(tiny_data, tmp_path, capsys):
    """They are trained on, and not evaluated on."""
    files = files_of(tiny_data / "train")
    labelled = []
    for i, (_, content) in enumerate(files):
        labelled += [(f"{i}.jpg", content), (f"{i}.json", b'{"label": 1}' if i else b'{"width": 3}')]
    for split in ("train", "val"):
        write_tar(tmp_path / "data" / f"{split}.tar", labelled)
    words = [*pretrain(tmp_path / "data", "", tmp_path), "--run.stop-at-step", "1"]
    assert main(words) == 0
    knn = ["knn", "--run-dir", str(tmp_path / "run"), "--data.num-workers", "0"]
    fails(knn, "0.jpg", capsys)


def test_validation_that_tar_shards_lack(tiny_data, tmp_path, capsys):
    write_tar(tmp_path / "data" / "train.tar", files_of(tiny_data / "train"))
    assert main([*pretrain(tmp_path / "data", "", tmp_path), "--run.stop-at-step", "1"]) == 0
    words = ["linear", "--run-dir", str(tmp_path / "run")]
    fails(words, "has no validation set; tar shards of one have val or validation in their names", capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prepare", "imagefolder", "--source", "X", "--out", "NEW"], "has tar shards, and links lead to files"),
        (["pack", "X", "X"], "is no name for a packed file"),
        (["pack", "P", "NEW.beton"], "is packed already; what is packed is a folder, tar shards or parquet"),
        (["index", "F", "--out", "NEW"], "has no tar shards, which an index is of"),
    ],
)
def test_commands_that_take_another_format(tiny_data, capsys, tmp_path, words, says):
    write_tar(tmp_path / "data" / "train.tar", files_of(tiny_data / "train"))
    shutil.copytree(tiny_data / "val", tmp_path / "few" / "train")
    places = {"X": tmp_path / "data", "F": tiny_data, "NEW": tmp_path / "new", "NEW.beton": tmp_path / "new.beton"}
    if "P" in words:
        places["P"] = pack(tmp_path / "few", tmp_path / "few.beton")
    fails(["data", *(str(places.get(word, word)) for word in words)], says, capsys)
