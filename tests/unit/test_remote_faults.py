"""An object store that fails, is away or does not come back: no image is skipped, and nothing waits for ever."""

import threading

import numpy as np
import pytest

from moco_dist.config.address import Url
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.remote import source
from moco_dist.data.sources import bytes_reader, find_images
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError
from tests.stores import in_a_child, running_store
from tests.tars import files_of, write_tar
from tests.unit.loaders import picture

pytestmark = pytest.mark.slow
ROOT = Url("s3://set")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("faults")
    for i in range(40):
        path = top / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 40 + i, 50).save(path)
    return top


@pytest.fixture
def stored(folder, monkeypatch, tmp_path, request):
    """The store; its parameter says which requests fail."""
    with running_store(fails_every=request.param) as store:
        store.put("set")
        for i in range(4):
            shard = tmp_path / f"train-{i}.tar"
            write_tar(shard, files_of(folder / "train")[i::4])
            store.put(f"set/{shard.name}", shard.read_bytes())
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        yield store


def contents(found):
    read = bytes_reader(found)
    return [bytes(read(i)[0]) for i in range(len(found.paths))]


def read_in_a_child(found, waits=source.READ_WAITS_SECONDS):
    """What `contents` returns or raises, in a process of its own."""

    def work():
        source.READ_WAITS_SECONDS = waits
        try:
            return contents(found)
        except Exception as error:
            return error

    return in_a_child(work)


@pytest.mark.parametrize("stored", [5], indirect=True)
def test_one_request_in_five_fails(folder, stored):
    found = find_images(ROOT, "train")
    assert read_in_a_child(found) == contents(find_images(folder, "train"))


@pytest.mark.parametrize("stored", [0], indirect=True)
def test_a_server_that_comes_back_is_waited_for_and_told(folder, stored, capfd):
    found = find_images(ROOT, "train")
    stored.away.touch()
    back = threading.Timer(6, stored.away.unlink)
    back.start()
    assert read_in_a_child(found) == contents(find_images(folder, "train"))
    back.join()
    assert "train-0.tar" in capfd.readouterr().err


@pytest.mark.parametrize("stored", [0], indirect=True)
def test_a_server_that_stays_away_ends_it_with_a_line(stored):
    found = find_images(ROOT, "train")
    stored.away.touch()
    error = read_in_a_child(found, waits=(0.1,))
    assert isinstance(error, InfrastructureError)
    assert str(error).startswith("cannot read image ") and str(error).endswith("503 Service Unavailable")
    assert "\n" not in str(error)
    with pytest.raises(InfrastructureError, match=r"s3://set cannot be read: 503 Service Unavailable"):
        find_images(ROOT, "train")


@pytest.mark.parametrize("stored", [0], indirect=True)
def test_what_a_cache_holds_needs_no_store(folder, stored, tmp_path):
    """An epoch by two workers, which fill it; then another one by two workers while the store is away."""
    found, plan = find_images(ROOT, "train"), Plan(40, 8, 0)

    def batches(images, start, **data):
        config = PretrainConfig.model_validate(
            {"run": {"dir": "unused"}, "optim": {"global_batch_size": 8}, "model": {"bn_group_size": 4},
             "data": {"root": images.root, "image_size": 16, "num_workers": 2, **data}}
        )  # fmt: skip
        return [batch.view_q for batch in pretrain_batches(images, config, plan, World(), start, start + 5)]

    local, cached = find_images(folder, "train"), {"cache_dir": tmp_path / "cache"}
    assert all(map(np.array_equal, batches(found, 0, **cached), batches(local, 0)))
    stored.away.touch()
    assert all(map(np.array_equal, batches(found, 5, **cached), batches(local, 5)))
