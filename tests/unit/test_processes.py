"""Worker processes: what they hand over, and what their rank learns when one cannot."""

import contextlib
import errno
import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time

import pytest
import torch

from moco_dist.data import processes
from moco_dist.data.images import ImageError
from moco_dist.data.processes import made_by_processes
from moco_dist.data.shared_memory import empty
from moco_dist.errors import LoadingError


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert multiprocessing.active_children() == []


def large(number):
    views = empty(2, 3, 100, 100)
    views.fill_(number)
    return {"views": (views[:1], views[1:]), "other": torch.full((9, 9999), number), "small": torch.arange(number)}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_items_arrive_whole_and_in_order(num_workers):
    for number, item in enumerate(made_by_processes(large, range(7), num_workers, 2)):
        assert [v.shape for v in item["views"]] == [(1, 3, 100, 100)] * 2
        assert all((v == number).all() for v in (*item["views"], item["other"]))
        assert torch.equal(item["small"], torch.arange(number))
        item["views"][0].fill_(0)  # memory of the rank's own
        assert (item["views"][1] == number).all()


def of_any_size(number):
    sizes = [40_000 + 1_000 * (7 * number % 11), 80_003 - 9_000 * (number % 3)]
    return [
        torch.full((size,), number, dtype=dtype) for size, dtype in zip(sizes, (torch.int64, torch.uint8), strict=True)
    ]


def whole(item, number):
    return all((part == number).all() for part in item)


def blocks_of_worker():
    (worker,) = multiprocessing.active_children()
    links = []
    for name in os.listdir(f"/proc/{worker.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # a socket's copy, closed since
            links.append(os.readlink(f"/proc/{worker.pid}/fd/{name}"))
    return sum("memfd" in link for link in links) // 2  # the block's own descriptor, and the map's


def test_memory_of_dropped_items_is_used_again():
    most, depth = 0, 2
    for number, item in enumerate(made_by_processes(large, range(60), 1, depth)):
        assert (item["views"][1] == number).all()
        assert (item["other"] == number).all()
        most = max(most, blocks_of_worker())
    assert most <= 2 * (depth + 2)  # two tensors an item: those ahead, the one looked at and the one before


def test_an_item_that_is_kept_stays_as_it_was():
    kept = {}
    for number, item in enumerate(made_by_processes(large, range(40), 1, 2)):
        part = item["views"][1]  # refers to the memory by itself
        if number % 3 == 0:
            kept[number] = part[:, 1]
        del item, part
    assert all((part == number).all() for number, part in kept.items())


def test_items_of_any_size_take_no_more_memory_than_those_in_use():
    kept, most = {}, 0
    for number, item in enumerate(made_by_processes(of_any_size, range(60), 1, 3)):
        kept = {**dict(list(kept.items())[-2:]), number: item}
        assert all(whole(item, number) for number, item in kept.items())
        most = max(most, blocks_of_worker())
    assert most <= 2 * (3 + 4)


def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    assert len(list(made_by_processes(large, range(20), 2, 2))) == 20
    assert len(os.listdir("/proc/self/fd")) == before


def unreadable(number):
    raise ImageError("cannot read image x.jpg: no such file")


def broken(number):
    return 1 // (number - 1)


def unpicklable(number):
    class Odd(Exception):
        pass

    raise Odd("odd")


def test_an_exception_is_raised_by_the_rank_as_it_was():
    with pytest.raises(ImageError, match=r"^cannot read image x\.jpg: no such file$"):
        list(made_by_processes(unreadable, range(3), 2, 1))
    items = made_by_processes(broken, range(3), 1, 2)
    assert next(items) == -1
    with pytest.raises(ZeroDivisionError) as caught:
        next(items)
    assert "1 // (number - 1)" in caught.value.__notes__[0]  # where in the worker
    with pytest.raises(RuntimeError, match="Odd: odd"):
        list(made_by_processes(unpicklable, range(1), 1, 1))


def no_file_left(number):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return large(number)


def no_memory_left(number):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (no_file_left, "a loader's worker cannot make or hand over a batch: too many open files; ulimit -n 4096"),
        (no_memory_left, "cannot allocate memory; fewer data.num_workers or data.prefetch_batches need less"),
    ],
)
def test_a_worker_that_cannot_hand_over_its_batch_says_why(make, line):
    with pytest.raises(LoadingError, match=line):
        list(made_by_processes(make, range(4), 2, 2))


def test_a_rank_that_may_open_no_file_for_a_batch_says_so():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    items = made_by_processes(large, range(4), 1, 1)
    next(items)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
        with pytest.raises(LoadingError, match="too many open files; ulimit -n 4096"):
            list(items)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class KilledOnce:
    """Its worker is killed at number 3, the first time or always."""

    def __init__(self, marker, always=False):
        self.marker, self.always = marker, always

    def __call__(self, number):
        if number == 3 and (self.always or not self.marker.exists()):
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((100, 1000), number)


def test_a_killed_worker_is_told_and_another_one_makes_its_batches(tmp_path, capsys):
    items = list(made_by_processes(KilledOnce(tmp_path / "killed"), range(8), 2, 2))
    assert [int(item[0, 0]) for item in items] == list(range(8))
    (line,) = capsys.readouterr().err.splitlines()
    assert "was killed (SIGKILL, as when memory is used up: fewer data.num_workers" in line
    assert "another one makes its batches" in line


def test_a_batch_that_kills_every_worker_ends_the_run_by_a_line(tmp_path):
    items = made_by_processes(KilledOnce(tmp_path / "killed", always=True), range(8), 2, 2)
    with pytest.raises(LoadingError, match=r"was killed \(SIGKILL, .*the 3rd at this batch"):
        list(items)


def test_what_every_worker_dies_of_its_rank_makes_if_others_need_it(tmp_path, capsys):
    def make(number):
        if multiprocessing.current_process().name == "loader":
            return killed(number)
        return torch.full((1,), -number)

    killed, lost = KilledOnce(tmp_path / "killed", always=True), []
    items = list(made_by_processes(make, range(6), 2, 2, on_lost=lost.append))
    assert [int(item.flatten()[0]) for item in items] == [0, 1, 2, -3, -4, -5]
    (error,) = lost
    assert f"{error}; this process makes what is still needed itself" in capsys.readouterr().err


def endless(number):
    time.sleep(3600)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)


def test_a_request_to_stop_is_heard_while_a_batch_is_waited_for(quick):
    looked = []
    with pytest.raises(LoadingError, match=r"asked to stop while no batch has come for 5 s .*\(it waits\)"):
        list(made_by_processes(endless, range(1), 1, 1, lambda: looked.append(0) or len(looked) == 5))


def test_a_long_wait_is_told_and_has_an_end(quick, monkeypatch, capsys):
    monkeypatch.setattr(processes, "GIVE_UP_SECONDS", 130)
    with pytest.raises(LoadingError, match="no batch has come for 130 s"):
        list(made_by_processes(endless, range(1), 1, 1))
    told = capsys.readouterr().err
    assert "no batch has come for 60 s" in told and "for 120 s" in told


def test_a_worker_does_not_wait_for_a_module_that_another_thread_imports(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import threading\n"
        "if threading.current_thread().name == 'pictures':\n"
        "    threading.has_begun.set(), threading.may_end.wait()\n"
        "VALUE = 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(threading, "has_begun", threading.Event(), raising=False)
    monkeypatch.setattr(threading, "may_end", threading.Event(), raising=False)

    def make(number):
        return importlib.import_module("slow_to_import").VALUE

    pictures = threading.Thread(target=make, args=(0,), name="pictures")
    pictures.start()
    threading.has_begun.wait()
    waits = itertools.count()
    try:
        assert list(made_by_processes(make, range(2), 2, 1, must_end=lambda: next(waits) > 20)) == [7, 7]
    finally:
        threading.may_end.set()
        pictures.join()
    assert sys.modules.pop("slow_to_import").VALUE == 7


def test_a_module_that_loads_while_it_is_imported_is_imported_once(tmp_path, monkeypatch):
    (tmp_path / "loads_at_import.py").write_text(
        "from moco_dist.data.processes import made_by_processes\n"
        "def make(number):\n"
        "    import loads_at_import\n"
        "    return number\n"
        "ITEMS = list(made_by_processes(make, range(2), 1, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("loads_at_import").ITEMS == [0, 1]
    del sys.modules["loads_at_import"]


def test_a_worker_ends_when_its_rank_is_gone():
    reader, writer = os.pipe()
    rank = os.fork()
    if rank == 0:

        def make(number):
            os.write(writer, b"%d " % os.getpid())
            return number

        next(made_by_processes(make, range(2), 1, 1))
        os._exit(0)  # as Heartbeat ends it: nothing is closed
    os.close(writer)
    os.waitpid(rank, 0)
    while os.read(reader, 100):  # to its end, which comes when the worker has closed its end too
        pass
    os.close(reader)
