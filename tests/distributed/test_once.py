"""One rank of each host lists the images; the others have the same list, and the same error, without a look."""

import os
import time

import pytest

from moco_dist.data import index
from moco_dist.data.sources import find_images
from moco_dist.distributed import once
from moco_dist.distributed.once import once_a_host
from moco_dist.errors import EXIT_IO, InfrastructureError, SaidElsewhere, UserError
from moco_dist.evaluate.subject import labelled_images
from moco_dist.run.resume import training_images
from tests.distributed.program import small_config
from tests.world import on_two_hosts, run


@pytest.fixture
def root(tmp_path):
    """A data set last changed a minute ago, which therefore may have an index."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                (tmp_path / "data" / split / name / f"{i}.jpg").touch()
    for path in (tmp_path / "data").rglob("*"):
        if path.is_dir():
            os.utime(path, (time.time() - 60, time.time() - 60))
    return tmp_path / "data"


def look(world, roots, run_dir):
    """How many folders this rank has listed, and how many of them for want of an index; its images."""
    index.MIN_IMAGES = 1
    counts, real, scan = {"listed": 0, "scanned": 0}, os.scandir, index._scan

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    os.scandir, index._scan = counted("listed", real), counted("scanned", scan)
    config = small_config(data={"root": roots[world.rank]}, run={"dir": run_dir})
    train = training_images(config, on_two_hosts(world))
    first = dict(counts)
    again, val = labelled_images(config.data.root, None, 4, run_dir / "index", on_two_hosts(world))
    assert (again.paths, len(val.paths)) == (train.paths, 4)
    return first, train.root, train.paths, train.labels.tolist(), train.classes


def test_one_rank_of_each_host_lists_and_the_others_have_its_list(root, tmp_path):
    first, second, third, fourth = run(look, 4, [root] * 4, tmp_path / "run")
    assert first[0]["listed"] > 3 and first[0]["scanned"] == 3  # train and its two classes
    assert second[0] == fourth[0] == {"listed": 0, "scanned": 0}
    assert third[0]["scanned"] == 0  # the index of rank 0 was there
    assert first[1:] == second[1:] == third[1:] == fourth[1:]
    assert first[2] == [f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(3)]


def test_each_host_may_have_a_copy_of_its_own(root, tmp_path):
    """And a rank that is given another folder than its host's first looks for itself."""
    other = tmp_path / "other"
    root.rename(other)
    (other / "train" / "emu").mkdir()
    (other / "train" / "emu" / "0.jpg").touch()
    (root / "train" / "yak").mkdir(parents=True)
    (root / "val" / "yak").mkdir(parents=True)
    for i in range(4):
        (root / "train" / "yak" / f"{i}.jpg").touch()
        (root / "val" / "yak" / f"{i}.jpg").touch()
    found = run(look, 4, [root, root, other, root], tmp_path / "run")
    assert [len(paths) for _, _, paths, *_ in found] == [4, 4, 7, 4]
    assert [place for _, place, *_ in found] == [root / "train", root / "train", other / "train", root / "train"]
    assert [counts["listed"] > 0 for counts, *_ in found] == [True, False, True, True]


def test_an_index_lies_in_the_runs_folder_where_the_data_cannot_be_written(root, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MIN_IMAGES", 1)
    monkeypatch.setattr(index, "NAME", "no such folder/index.json")
    monkeypatch.setattr(index, "write_whole", refuse_below(root, index.write_whole))
    elsewhere = tmp_path / "run" / "index"
    paths = find_images(root, "train", index_folder=elsewhere).paths
    find_images(root, "val", index_folder=elsewhere)
    assert len(list(elsewhere.iterdir())) == 2
    monkeypatch.setattr(index, "_scan", None)  # not called again
    assert find_images(root, "train", index_folder=elsewhere).paths == paths


def refuse_below(root, write):
    def refuse(path, content):
        if path.is_relative_to(root):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    return refuse


def outcomes(world, makes):
    """What `once_a_host` comes to where some ranks' `make` raises: for each of `makes`, {rank: error}."""
    found, once.SAID_SECONDS = [], 0.0
    for errors in makes:

        def make(errors=errors):
            if world.rank in errors:
                raise errors[world.rank]
            return world.rank

        try:
            found.append(once_a_host(make, "it", on_two_hosts(world)))
        except (UserError, OSError) as raised:
            found.append((type(raised), str(raised), getattr(raised, "exit_status", EXIT_IO)))
    return found


def test_one_rank_says_an_error_and_all_end_with_its_status():
    errors = [(UserError("no such folder"), 2), (InfrastructureError("gone"), 74), (PermissionError(13, "no"), EXIT_IO)]
    makes = [{rank: error} for error, _ in errors for rank in (0, 2)]
    results = run(outcomes, 4, [{}, *makes, {}])
    assert [found.pop(0) for found in results] == [found.pop() for found in results] == [0, 0, 2, 2]
    for number, (error, status) in enumerate(error for error in errors for _ in range(2)):
        for rank, found in enumerate(results):
            kind = type(error) if rank in makes[number] else SaidElsewhere
            assert found[number] == (kind, str(error), status)
