"""The very same run, bit for bit, from a folder, a packed file, and tar shards on a disk or in an object store."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from moco_dist.cli.main import main
from moco_dist.datasets.pack import pack
from tests.faults.processes import TINY, command, losses, steps_logged, wait_for_step
from tests.stores import store_of_this_process
from tests.tars import files_of, with_labels, write_tar
from tests.unit.loaders import picture

STOP, END = 3, 6


@pytest.fixture(scope="module")
def store():
    with store_of_this_process() as running:
        yield running


@pytest.fixture(scope="module")
def roots(tmp_path_factory, store):
    """The same 30 images in each format: name to the words that a run is given."""
    top = tmp_path_factory.mktemp("formats")
    for i in range(30):
        path = top / "folder" / "train" / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 40 + i, 50).save(path)
    files = files_of(top / "folder" / "train")
    shuffled = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    for i in range(3):
        write_tar(top / "tars" / f"train-{i}.tar", shuffled[i::3])
    labelled = with_labels(files)
    for i in range(2):
        write_tar(top / "webdataset" / f"x-train-{i:04d}.tar", labelled[30 * i : 30 * i + 30])
    inner = []
    for folder in "abc":
        members = [(name[2:], content) for name, content in files if name.startswith(folder)]
        inner.append((f"{folder}.tar", write_tar(top / "inner.tar", members).read_bytes()))
    write_tar(top / "archive" / "ILSVRC2012_img_train.tar", inner)
    write_tar(top / "plain" / "set.tar", [(f"data/set/train/{name}", content) for name, content in shuffled])
    pack(top / "folder", top / "x.beton")
    store.put("set")
    store.put_folder(top / "tars", "set/tars")
    return {
        "store": ["--data.root", "s3://set/tars"],
        "folder": ["--data.root", str(top / "folder")],
        "tars": ["--data.root", str(top / "tars")],
        "webdataset": ["--data.root", str(top / "webdataset" / "x-train-{0000..0001}.tar")],
        "a tar of tars": ["--data.root", str(top / "archive" / "ILSVRC2012_img_train.tar")],
        "a tar of folders": ["--data.root", str(top / "plain")],
        "packed": ["--data.root", str(top / "x.beton"), "--data.loader", "ffcv"],
    }


def pretrain(run_dir, words, stop, ranks=1):
    words = [*words, *TINY, "--log.every-steps", "1", "--run.stop-at-step", str(stop)]
    if ranks == 1 and "s3:" not in words[1]:  # a store is read in a process that ends: workers forked later could not
        assert main(["pretrain", "--run.dir", str(run_dir), *words]) == 0
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command("unused", run_dir, *words, ranks=ranks), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return losses(run_dir)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_format(roots, tmp_path):
    runs = {name: pretrain(tmp_path / name, words, STOP) for name, words in roots.items()}
    assert len(runs["folder"]) == STOP
    for name, run in runs.items():
        assert run == runs["folder"], name


@pytest.mark.slow
def test_a_run_goes_on_in_another_format_on_more_ranks(roots, tmp_path):
    for name, one, other in (("same", "folder", "folder"), ("other", "webdataset", "packed"),
                             ("stored", "packed", "store")):  # fmt: skip
        pretrain(tmp_path / name, roots[one], STOP)
        pretrain(tmp_path / name, roots[other], END, ranks=2)
    same = losses(tmp_path / "same")
    assert list(same) == list(range(1, END + 1))
    assert same == losses(tmp_path / "other") == losses(tmp_path / "stored")


@pytest.mark.slow
def test_ranks_wait_for_a_store_that_is_away(roots, store, start, tmp_path):
    """For longer than a rank may be silent, which a rank that waits is not; no image is left out."""
    words = [*roots["store"], "--data.num-workers", "1", "--log.every-steps", "1", "--run.stop-at-step", "20"]
    stored = start(tmp_path / "stored", *words)
    wait_for_step(stored, tmp_path / "stored", 3)
    store.away.touch()
    time.sleep(8)
    at = steps_logged(tmp_path / "stored")
    store.away.unlink()
    output = stored.communicate()[0]
    assert stored.returncode == 0, output
    assert at < 20 and "failed (503 service unavailable); tried again" in output, output
    local = start(tmp_path / "local", *roots["folder"], *words[2:])
    assert local.wait() == 0, local.communicate()[0]
    assert losses(tmp_path / "stored") == losses(tmp_path / "local")


@pytest.mark.slow
def test_other_images_in_another_format_are_refused(roots, tmp_path, capsys):
    pretrain(tmp_path / "run", roots["folder"], 1)
    folder = tmp_path / "folder" / "train"
    for name, content in files_of(Path(roots["folder"][1]) / "train"):
        other = f"{'abd'['abc'.index(name[0])]}{name[1:]}"  # of other classes
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content)
    words = [*TINY, "--data.root", str(tmp_path / "folder"), "--run.stop-at-step", "2", "--log.every-steps", "1"]
    capsys.readouterr()
    assert main(["pretrain", "--run.dir", str(tmp_path / "run"), *words]) == 2
    assert "holds a run over other images (step_00000001): 10 came (d/" in capsys.readouterr().err
