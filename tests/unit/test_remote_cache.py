"""The blocks of remote files that a disk keeps: shared, and right whatever a crash or a full disk leaves."""

import errno
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from moco_dist.config.address import Url
from moco_dist.data.images import Places
from moco_dist.data.remote import cache as module
from moco_dist.data.remote.cache import BLOCK_BYTES, BlockCache, kept_bytes, opened_cache

ROOT = Url("s3://set/shards")
SIZES = [10 * BLOCK_BYTES + 17, 3 * BLOCK_BYTES, 100]
CONTENTS = [random.Random(i).randbytes(size) for i, size in enumerate(SIZES)]
FORK = multiprocessing.get_context("fork")


def places(tag="a", root=ROOT, changed_ns=5):
    urls, none = [root / f"{i}.tar" for i in range(len(SIZES))], np.zeros(0, np.int64)
    return Places(
        urls, [[size, changed_ns] for size in SIZES], none.astype(np.int32), none, none, tags=[tag] * len(SIZES)
    )


class Remote:
    """What is fetched of file number `number`."""

    def __init__(self, number=0, contents=CONTENTS):
        self.content, self.number, self.asked = contents[number], number, []

    def __call__(self, start, end):
        self.asked.append((start, end))
        return memoryview(self.content)[start:end]

    def read(self, cache, start, end):
        data = bytes(cache.read(self.number, start, end, self))
        assert data == self.content[start:end]
        return data


def open_cache(folder, most_bytes=None, root=ROOT):
    return BlockCache(folder, most_bytes, root, places(root=root))


def test_what_was_read_is_not_fetched_again(tmp_path):
    cache, remote = open_cache(tmp_path / "cache"), Remote()
    remote.read(cache, 100, BLOCK_BYTES + 5)
    assert remote.asked == [(0, 2 * BLOCK_BYTES)]
    remote.read(cache, 0, 2 * BLOCK_BYTES)
    remote.read(cache, BLOCK_BYTES - 1, BLOCK_BYTES + 1)
    assert len(remote.asked) == 1
    remote.read(cache, BLOCK_BYTES, 4 * BLOCK_BYTES)  # the first of the three is here
    assert remote.asked[1:] == [(2 * BLOCK_BYTES, 4 * BLOCK_BYTES)]
    remote.read(cache, 10 * BLOCK_BYTES, SIZES[0])  # the last block is short
    remote.read(open_cache(tmp_path / "cache"), 10 * BLOCK_BYTES + 3, SIZES[0] - 2)
    assert remote.asked[2:] == [(10 * BLOCK_BYTES, SIZES[0])]
    assert kept_bytes(tmp_path / "cache") == 5 * BLOCK_BYTES


def test_processes_share_it(tmp_path):
    """Eight that read at random, forked after it was opened, as a rank's workers are; then one that finds it all."""
    cache = open_cache(tmp_path)

    def read_all(seed):
        order = random.Random(seed)
        remotes = [Remote(number) for number in range(3)]
        for _ in range(60):
            remote = order.choice(remotes)
            start = order.randrange(len(remote.content))
            remote.read(cache, start, order.randrange(start + 1, len(remote.content) + 1))
        for remote in remotes:
            remote.read(cache, 0, len(remote.content))

    children = [FORK.Process(target=read_all, args=(seed,)) for seed in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    for number in range(3):
        remote = Remote(number)
        remote.read(open_cache(tmp_path), 0, len(remote.content))
        assert not remote.asked


@pytest.mark.parametrize("killed_at", ["first block", "between", "marks"])
def test_a_process_that_is_killed_in_the_middle_of_a_write_leaves_nothing_wrong(tmp_path, killed_at):
    def pwrite(file, data, start, write=os.pwrite):
        kind = Path(os.readlink(f"/proc/self/fd/{file}")).suffix
        if killed_at == "first block" and kind == ".blocks":
            write(file, data[: BLOCK_BYTES // 2], start)
            os.kill(os.getpid(), signal.SIGKILL)
        if killed_at != "first block" and kind == ".marks":
            write(file, data[: 0 if killed_at == "between" else 6], start)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data, start)

    def work():
        module.os.pwrite = pwrite
        Remote().read(open_cache(tmp_path), 0, 3 * BLOCK_BYTES)

    child = FORK.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    cache, remote = open_cache(tmp_path), Remote()
    remote.read(cache, 0, 3 * BLOCK_BYTES)
    assert remote.asked == [((killed_at == "marks") * BLOCK_BYTES, 3 * BLOCK_BYTES)]
    remote.read(cache, 0, 3 * BLOCK_BYTES)
    assert len(remote.asked) == 1
    assert int((tmp_path / "used").read_text()) <= 4 * BLOCK_BYTES  # what the dead one had reserved is free again


def test_a_block_that_does_not_fit_its_mark_is_fetched_again(tmp_path):
    """As after a power cut, when the mark has reached the disk and the block has not; or a bit that flips."""
    cache, remote = open_cache(tmp_path), Remote()
    remote.read(cache, 0, 4 * BLOCK_BYTES)
    (blocks,) = tmp_path.glob("*/*.blocks")
    with blocks.open("r+b") as file:
        file.seek(BLOCK_BYTES + 7)
        file.write(bytes([CONTENTS[0][BLOCK_BYTES + 7] ^ 1]))
        file.seek(3 * BLOCK_BYTES)
        file.write(bytes(BLOCK_BYTES))
    remote.read(cache, 0, BLOCK_BYTES)
    assert len(remote.asked) == 1
    remote.read(cache, 0, 4 * BLOCK_BYTES)
    assert remote.asked[1:] == [(BLOCK_BYTES, 4 * BLOCK_BYTES)]
    remote.read(cache, 0, 4 * BLOCK_BYTES)
    assert len(remote.asked) == 2


@pytest.mark.parametrize("now", [{"tag": "b"}, {"changed_ns": 6}])
def test_a_file_that_has_changed_has_no_blocks_here(tmp_path, now):
    """By its tag, or on a server without tags by its time."""
    Remote().read(open_cache(tmp_path), 0, 100)
    changed = Remote(contents=[bytes(SIZES[0])])
    changed.read(BlockCache(tmp_path, None, ROOT, places(**now)), 0, 100)
    assert len(changed.asked) == 1
    assert kept_bytes(tmp_path) == BLOCK_BYTES  # those of the old one are gone


def test_no_more_is_kept_than_may_be_and_what_was_first_stays(tmp_path):
    cache, remote = open_cache(tmp_path, most_bytes=3 * BLOCK_BYTES), Remote()
    for _ in range(2):
        for block in (8, 1, 5, 0, 7):
            remote.read(cache, block * BLOCK_BYTES + 10, block * BLOCK_BYTES + 20)
    block = BLOCK_BYTES
    kept = [(8 * block, 9 * block), (block, 2 * block), (5 * block, 6 * block)]
    assert remote.asked == [*kept, *[(0 + 10, 20), (7 * block + 10, 7 * block + 20)] * 2]  # no more than is asked for
    assert kept_bytes(tmp_path) == 3 * block
    remote.read(cache, 5 * block + 5, 7 * block + 5)  # one is here, of the other a part is needed
    assert remote.asked[-1] == (6 * block, 7 * block + 5)
    remote.read(open_cache(tmp_path, most_bytes=3 * block), 0, 10)
    assert kept_bytes(tmp_path) == 3 * block


def test_without_a_limit_a_tenth_of_what_is_free_stays_free(tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=5 * BLOCK_BYTES))
    cache, remote = open_cache(tmp_path), Remote()
    for block in range(8):
        remote.read(cache, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
    assert kept_bytes(tmp_path) == 4 * BLOCK_BYTES


def test_a_fetch_that_fails_takes_no_room(tmp_path):
    cache, remote = open_cache(tmp_path, most_bytes=2 * BLOCK_BYTES), Remote()

    def fails(start, end):
        raise OSError(errno.EIO, "the server does not answer")

    for _ in range(5):
        with pytest.raises(OSError, match="does not answer"):
            cache.read(0, 0, 2 * BLOCK_BYTES, fails)
    remote.read(cache, 0, 2 * BLOCK_BYTES)
    remote.read(cache, 0, 2 * BLOCK_BYTES)
    assert len(remote.asked) == 1


def test_a_data_set_that_nobody_reads_makes_room(tmp_path):
    first, second = ROOT, Url("s3://other")
    limit = sum(SIZES) + BLOCK_BYTES
    Remote().read(open_cache(tmp_path, limit, first), 0, 5 * BLOCK_BYTES)
    in_use = open_cache(tmp_path, limit, first)
    Remote().read(open_cache(tmp_path, limit, second), 0, BLOCK_BYTES)
    assert kept_bytes(tmp_path) == 6 * BLOCK_BYTES
    del in_use
    assert open_cache(tmp_path, limit, second)
    assert kept_bytes(tmp_path) == BLOCK_BYTES
    third = Url("s3://third")
    remote = Remote()
    remote.read(open_cache(tmp_path, 100 * sum(SIZES), third), 0, BLOCK_BYTES)  # there is room for both
    assert kept_bytes(tmp_path) == 2 * BLOCK_BYTES


def test_a_full_disk_is_said_once_by_all_processes(tmp_path, capfd):
    cache, both_have_read = open_cache(tmp_path), FORK.Barrier(2)

    def pwrite(file, data, start, write=os.pwrite):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".blocks"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, start)

    def work():
        module.os.pwrite = pwrite
        for _ in range(2):
            Remote().read(cache, 0, 2 * BLOCK_BYTES)
            Remote(1).read(cache, 0, BLOCK_BYTES)
        both_have_read.wait(30)

    children = [FORK.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    said = capfd.readouterr().err
    assert said == f"warning: data.cache_dir {tmp_path}: no space left on device; what it lacks is fetched each time\n"


def test_a_folder_that_cannot_be_used_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert opened_cache(tmp_path / "file" / "cache", None, ROOT, places()) is None
    assert capsys.readouterr().err.endswith("/file/cache: not a directory; nothing is kept there\n")


def test_a_disk_that_fails_is_read_past(tmp_path, capsys, monkeypatch):
    cache, remote = open_cache(tmp_path), Remote()
    remote.read(cache, 0, 100)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, "preadv", fails)
    remote.read(cache, 0, 100)
    assert "input/output error; what it lacks is fetched each time" in capsys.readouterr().err


def hits(policy, share, count=2_000, epochs=6):
    """The share of reads that a cache of `share` of the images answers, in epochs of a permutation each, after two."""
    orders = [np.random.default_rng(epoch).permutation(count) for epoch in range(epochs + 1)]
    next_use = {(epoch, int(i)): epoch * count + at for epoch, order in enumerate(orders) for at, i in enumerate(order)}
    room, kept, found, asked = int(share * count), {}, 0, 0  # image: what decides whether it goes
    for epoch, order in enumerate(orders[:-1]):
        for at, i in enumerate(order.tolist()):
            if epoch >= 2:
                asked, found = asked + 1, found + (i in kept)
            if policy == "first" and (i in kept or len(kept) == room):
                continue
            kept[i] = -(epoch * count + at) if policy == "least recently used" else next_use[epoch + 1, i]
            if len(kept) > room:  # what was read longest ago goes, or what the plan needs last, this one perhaps
                del kept[max(kept, key=kept.__getitem__)]
    return round(100 * found / asked)


SHARES = {0.1: (10, 0, 10), 0.5: (50, 15, 50), 0.9: (90, 67, 90)}  # of the set that fits: hits in percent


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
def test_to_keep_what_is_read_first_is_as_good_as_to_know_the_plan(share):
    found = [hits(policy, share) for policy in ("first", "least recently used", "plan")]
    assert found == pytest.approx(SHARES[share], abs=1)
    line = f"| {100 * share:.0f} % |" + "".join(f" {percent} % |" for percent in SHARES[share])
    assert line in Path("docs/data.md").read_text()
