"""The memory of a loader's workers does not grow with the files that they have named."""

import gc
from pathlib import Path

import numpy as np
import pytest

from moco_dist.data.index import NAME, VERSION
from moco_dist.data.mapped import file_of
from moco_dist.data.names import in_arrays
from moco_dist.data.processes import made_by_processes
from moco_dist.data.sources import find_images
from moco_dist.data.workers import Files
from moco_dist.files import write_whole
from tests.world import run

IMAGES, CLASSES = 1_000_000, 10
MAY_GROW_KB = 4_000  # a list of so many strings makes a worker grow by 76,000 kB and more


@pytest.fixture
def folder(tmp_path):
    """A folder whose index tells of a million images; nobody opens one."""
    classes = [f"n{label:08d}" for label in range(CLASSES)]
    for name in classes:
        (tmp_path / name).mkdir()
    content, ends = in_arrays([f"{name}/{name}_{i:07d}.JPEG" for name in classes for i in range(IMAGES // CLASSES)])
    facts = {
        "version": VERSION, "top": classes, "classes": classes, "content_hash": "x",
        "folders": {name: (tmp_path / name).stat().st_mtime_ns for name in classes},
    }  # fmt: skip
    labels = np.repeat(np.arange(CLASSES), IMAGES // CLASSES)
    write_whole(tmp_path / NAME, file_of(facts, {"content": content, "ends": ends, "labels": labels}))
    return tmp_path


def private_kb():
    """Memory of this process that it shares with no other one, the rank that it is a fork of."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def named_by_workers(_, folder):
    """What each of two workers has counted, and by how many kB it has grown."""
    files = Files(find_images(folder, "train"))
    labels = files.folder.labels

    def names_all(_):
        gc.disable()
        before, letters = private_kb(), 0
        for i in range(len(files)):
            letters += len(files.folder.paths[i]) + labels[i]
        return len(files), int(letters), private_kb() - before

    return list(made_by_processes(names_all, range(2), 2, 1))


@pytest.mark.slow
def test_a_worker_that_has_named_a_million_images_has_grown_by_nothing(folder):
    """In processes of a young rank: a worker has its own copy of any page of what tests have left that it writes to."""
    for count, letters, growth in run(named_by_workers, 1, folder)[0]:
        assert (count, letters) == (IMAGES, IMAGES * 32 + IMAGES * (CLASSES - 1) // 2)
        assert growth < MAY_GROW_KB
