"""knn, linear, finetune, features and the Python door on images at an address: the same as on the folder of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import moco_dist
from moco_dist.cli.main import main
from moco_dist.datasets.pack import pack
from moco_dist.errors import UserError
from tests.faults.processes import TINY
from tests.stores import in_a_child, store_of_this_process
from tests.tars import files_of, write_tar

pytestmark = pytest.mark.slow
EVALUATION = ["--data.num-workers", "0", "--tracking", "none"]
COMMANDS = {
    "knn": ["--neighbours", "5"],
    "linear": ["--epochs", "2", "--global-batch-size", "20"],
    "finetune": ["--epochs", "1", "--global-batch-size", "20"],
}


@pytest.fixture(scope="module")
def store():
    with store_of_this_process() as running:
        yield running


@pytest.fixture(scope="module")
def run_dir(tiny_data, tmp_path_factory, store):
    """A run on a folder, whose images are in the store too, as shards and as a packed file."""
    top = tmp_path_factory.mktemp("remote_evaluations")
    store.put("set")
    for split in ("train", "val"):
        files = files_of(tiny_data / split)
        for i in range(2):
            shard = write_tar(top / f"{split}-{i}.tar", files[i::2])
            store.put(f"set/shards/{shard.name}", shard.read_bytes())
    store.put("set/x.beton", pack(tiny_data, top / "x.beton").read_bytes())
    words = ["--data.root", str(tiny_data), "--run.dir", str(top / "run"), *TINY, "--optim.epochs", "1"]
    assert main(["pretrain", *words]) == 0
    return top / "run"


SHARDS, PACKED = ["s3://set/shards"], ["s3://set/x.beton", "--data.loader", "ffcv"]


@pytest.mark.parametrize(
    ("command", "root"), [("knn", SHARDS), ("linear", SHARDS), ("finetune", SHARDS), ("knn", PACKED)]
)
def test_an_evaluation_of_an_address_is_that_of_the_folder(run_dir, tmp_path, command, root):
    results = []
    for place in ([], ["--data.root", *root, "--data.cache-dir", str(tmp_path / "cache")]):
        shutil.copytree(run_dir, tmp_path / "run")
        words = [command, "--run-dir", str(tmp_path / "run"), *EVALUATION, *COMMANDS[command], *place]
        assert in_a_child(lambda: main(words)) == 0  # noqa: B023
        results.append(json.loads((tmp_path / "run" / "eval" / f"{command}_trained.json").read_text()))
        shutil.rmtree(tmp_path / "run")
    folder, address = results
    assert address["accuracy"] == folder["accuracy"]
    assert address.get("curve") == folder.get("curve")
    assert list((tmp_path / "cache").glob("*/*.blocks"))


LOCAL_SHARDS, LOCAL_PACKED = ["{top}/{{train,val}}-{{0..1}}.tar"], ["{top}/x.beton", "--data.loader", "ffcv"]


@pytest.mark.parametrize("root", [LOCAL_SHARDS, LOCAL_PACKED, SHARDS, PACKED])
def test_the_report_has_the_pictures_wherever_they_lie(run_dir, tmp_path, root):
    """Of shards, of a packed file and at an address, the nearest neighbours are shown that the folder has."""
    shown = []
    for place in ([], [word.format(top=run_dir.parent) for word in root]):
        shutil.copytree(run_dir, tmp_path / "run")
        words = ["knn", "--run-dir", str(tmp_path / "run"), *EVALUATION, *COMMANDS["knn"]]
        report = ["report", str(tmp_path / "run"), *(["--data-root", place[0]] if place else [])]
        evaluate = [*words, "--data.root", *place] if place else words
        assert in_a_child(lambda: main(evaluate) + main(report)) == 0  # noqa: B023
        page = (tmp_path / "run" / "report" / "index.html").read_text()
        shown.append(page.partition('<section id="neighbours">')[2].partition("</section>")[0])
        shutil.rmtree(tmp_path / "run")
    folder, elsewhere = shown
    assert folder.count("<img") == 8 * 6 and "file not found" not in folder
    assert elsewhere == folder


def test_an_evaluation_takes_the_cache_of_its_run(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    settings = tmp_path / "run" / "config.yaml"
    cached = settings.read_text().replace("cache_dir: null", f"cache_dir: {tmp_path / 'cache'}")
    assert cached != settings.read_text()
    settings.write_text(cached)
    words = ["knn", "--run-dir", str(tmp_path / "run"), *EVALUATION, *COMMANDS["knn"], "--data.root", "s3://set/shards"]
    assert in_a_child(lambda: main(words)) == 0
    assert list((tmp_path / "cache").glob("*/*.blocks"))


@pytest.mark.parametrize("root", ["s3://set/shards", "s3://set/x.beton"])
def test_features_of_an_address_are_those_of_the_folder(run_dir, tiny_data, tmp_path, root):
    written = []
    for name, images in (("folder", str(tiny_data)), ("address", root)):
        words = ["features", str(run_dir), images, "--out", str(tmp_path / f"{name}.npz"), "--num-workers", "1"]
        assert in_a_child(lambda: main(words)) == 0  # noqa: B023
        written.append(np.load(tmp_path / f"{name}.npz"))
    folder, address = written
    for name in ("paths", "features", "labels", "classes"):
        assert np.array_equal(address[name], folder[name]), name
    assert json.loads(str(address["model"]))["images"] == (root if root.endswith("shards") else f"{root}/train")


def test_the_python_door_takes_an_address(run_dir, tiny_data):
    def ask():
        backbone = moco_dist.load_backbone(run_dir, device="cpu")
        ours = [backbone.features(root, num_workers=1) for root in ("s3://set/shards", str(tiny_data))]
        said = []
        for ask in (lambda: backbone.transform("s3://set/shards/a.jpg"),
                    lambda: backbone.features(Path("s3://set/shards"))):  # fmt: skip
            with pytest.raises(UserError) as error:
                ask()
            said.append(str(error.value))
        return ours[0].paths == ours[1].paths, bool((ours[0].values == ours[1].values).all()), said

    same_paths, same_values, said = in_a_child(ask)
    assert same_paths and same_values
    assert said == [
        "s3://set/shards/a.jpg: images one by one are not read from an address; features() reads tar shards there",
        "s3:/set/shards: an address is given as text; a Path makes s3:/ of s3://",
    ]


def test_a_config_of_python_takes_an_address():
    config = moco_dist.pretrain_config(run={"dir": "r"}, data={"root": "s3://set/shards"})
    assert config.data.root == "s3://set/shards"
    with pytest.raises(UserError, match="s3:/set is no address; did you mean s3://set"):
        moco_dist.pretrain_config(run={"dir": "r"}, data={"root": "s3:/set"})
