"""A loader ends when it is closed, dropped or fails: its threads, its processes, and DALI's pipeline."""

import contextlib
import gc
import multiprocessing
import threading

import pytest

from moco_dist.data import dali as dali_loader
from moco_dist.data.images import ImageError
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.distributed.world import World
from tests.unit.loaders import batches_of, config_of, damaged, sizes_known_already, undamaged

pytest.importorskip("nvidia.dali", reason="needs pip install 'moco_dist[dali]'")


@pytest.fixture
def pipelines(monkeypatch):
    """Every pipeline that is made, while nobody collects garbage."""
    made, build = [], dali_loader._pipeline

    def kept(*args):
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(dali_loader, "_pipeline", kept)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def dali(root, stop=9, **data):
    config = config_of(root, "dali", **data)
    return pretrain_batches(find_images(root, "train"), config, Plan(8, 8, 0), World(), 0, stop)


def taken_whole(root, monkeypatch):
    assert len(list(dali(root, 2))) == 2


def closed_half_way(root, monkeypatch):
    batches = dali(root)
    next(batches)
    batches.close()
    assert list(batches) == []


def dropped_half_way(root, monkeypatch):
    next(dali(root))


def interrupted(root, monkeypatch):
    with pytest.raises(KeyboardInterrupt), contextlib.closing(dali(root)) as batches:
        for _ in batches:
            raise KeyboardInterrupt


def damaged_file(root, monkeypatch):
    damaged(root, "truncated")
    with pytest.raises(ImageError):
        list(dali(root))


def damaged_after_the_headers_were_read(root, monkeypatch):
    sizes_known_already(monkeypatch, root)
    damaged(root, "random")
    assert len(list(dali(root, 2, on_error="skip-and-report"))) == 2


WAYS = [taken_whole, closed_half_way, dropped_half_way, interrupted, damaged_file, damaged_after_the_headers_were_read]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_pipelines_end_with_their_batches(tmp_path, pipelines, monkeypatch, way):
    undamaged(tmp_path)
    way(tmp_path, monkeypatch)
    assert pipelines and all(pipe._pipe is None for pipe in pipelines)
    assert "loader" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_forked_process_may_collect_what_is_left_of_dali(tmp_path, pipelines, monkeypatch, way):
    """A worker that destroyed a running pipeline would wait for good for threads that it has not."""
    undamaged(tmp_path)
    way(tmp_path, monkeypatch)
    garbage = pipelines.copy()
    garbage.append(garbage)  # only the garbage collector sees it
    pipelines.clear()
    del garbage
    worker = multiprocessing.get_context("fork").Process(target=gc.collect)
    worker.start()
    worker.join(60)
    worker.kill()
    assert worker.exitcode == 0
    assert len(batches_of(config_of(tmp_path, "torchvision", num_workers=1, on_error="skip-and-report"), 0, 2)) == 2
