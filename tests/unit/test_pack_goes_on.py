"""`data pack` that was stopped: the same command goes on, and its file is as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.datasets import pack as packing
from moco_dist.datasets import unfinished
from moco_dist.datasets.pack import pack
from moco_dist.errors import EXIT_IN_USE, EXIT_IO, EXIT_PREEMPTED, Preempted
from moco_dist.files import LineFile
from tests.tars import files_of, write_tar

COUNT = 10  # images, in chunks of two
OPTIONS = {"max_side": 30, "raw_share": 0.5}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Eight training images, two of which cannot be read, and two to validate; pages are small, so many are begun."""
    monkeypatch.setattr(packing, "CHUNK", 2)
    monkeypatch.setattr("moco_dist.data.beton.PAGE_BYTES", 4096)
    root = tmp_path / "set"
    for i in range(COUNT):
        path = root / ("train" if i < 8 else "val") / "ant" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20 + 5 * i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    for i in (1, 6):
        (root / "train" / "ant" / f"{i}.jpg").write_bytes(b"no image")
    return root


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of images that were encoded; at the one called `stops_at`, this process is asked to stop."""

    class Numbers(list):
        stops_at = -1

    numbers, original = Numbers(), packing._encode

    def counted(read, i, *options):
        numbers.append(i)
        if len(numbers) == numbers.stops_at:
            os.kill(os.getpid(), numbers.signal)
            time.sleep(0.1)  # a thread hears it
        return original(read, i, *options)

    numbers.signal = signal.SIGTERM
    monkeypatch.setattr(packing, "_encode", counted)
    return numbers


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def stopped(images, out, encoded, at, signum=signal.SIGTERM):
    """Call `pack` and stop it at the image of this count."""
    encoded.clear()
    encoded.stops_at, encoded.signal = at, signum
    with pytest.raises(Preempted) as stop:
        pack(images, out, **OPTIONS)
    assert not out.exists()
    encoded.clear()
    encoded.stops_at = -1
    return str(stop.value)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("at", [[1], [7], [3, 3, 3]])
def test_the_same_file_as_in_one_go(images, tmp_path, encoded, capsys, at, signum):
    whole = pack(images, tmp_path / "whole.beton", **OPTIONS)
    out = tmp_path / "x.beton"
    for count in at:
        line = stopped(images, out, encoded, count, signum)
        assert f"of {COUNT} images are packed; run the same command to go on" in line
    capsys.readouterr()
    pack(images, out, **OPTIONS)
    assert "x.beton goes on after" in capsys.readouterr().out
    assert len(encoded) < COUNT
    assert out.read_bytes() == whole.read_bytes()
    lists = [path.with_name(f"{path.name}.unreadable.txt").read_text() for path in (whole, out)]
    assert lists[0] == lists[1]
    assert not hidden(tmp_path)


def replaced(images):
    pixels = np.random.default_rng(99).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "train/ant/3.jpg")


def mended(images):
    (images / "train/ant/1.jpg").write_bytes((images / "train/ant/3.jpg").read_bytes())


def added(images):
    replaced(images)
    (images / "train/ant/3.jpg").rename(images / "train/ant/33.jpg")


def other_class(images):
    (images / "train/aaa").mkdir()
    (images / "train/ant/3.jpg").rename(images / "train/aaa/3.jpg")


@pytest.mark.parametrize(("change", "again"), [(replaced, 8), (mended, 10), (added, 10), (other_class, 10)])
def test_what_has_changed_since_is_packed_anew(images, tmp_path, encoded, change, again):
    out = tmp_path / "x.beton"
    stopped(images, out, encoded, 7)
    change(images)
    pack(images, out, **OPTIONS)
    assert again <= len(encoded) <= again + 1  # one that could not be read is looked at again
    assert out.read_bytes() == pack(images, tmp_path / "whole.beton", **OPTIONS).read_bytes()


def test_a_file_that_could_not_be_opened_and_can_be_now(images, tmp_path, encoded, monkeypatch):
    """Its size and time are as before."""
    original, out = packing._encode, tmp_path / "x.beton"
    monkeypatch.setattr(packing, "_encode", lambda read, i, *options: packing.Packed(0, 0, 0, b"", "permission denied")
                        if i == 0 else original(read, i, *options))  # fmt: skip
    stopped(images, out, encoded, 3)
    monkeypatch.setattr(packing, "_encode", original)
    pack(images, out, **OPTIONS)
    assert out.read_bytes() == pack(images, tmp_path / "whole.beton", **OPTIONS).read_bytes()


def test_other_options_begin_anew(images, tmp_path, encoded, capsys):
    out = tmp_path / "x.beton"
    stopped(images, out, encoded, 7)
    pack(images, out)
    assert "begins anew" in capsys.readouterr().out
    assert len(encoded) == COUNT
    assert out.read_bytes() == pack(images, tmp_path / "whole.beton").read_bytes()


DAMAGES = {
    "zeros": lambda lines: [*lines[:1], bytes(20), *lines[2:]],
    "half a line": lambda lines: [*lines[:2], lines[2][:9]],
    "another line": lambda lines: [b"12", *lines[1:]],
    "a number": lambda lines: [*lines[:2], b"12", *lines[3:]],
    "empty": lambda lines: [],
    "the file is cut off": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_costs_what_it_has_lost(images, tmp_path, encoded, damage):
    out = tmp_path / "x.beton"
    stopped(images, out, encoded, 7)
    journal, partial = tmp_path / ".x.beton.partial.jsonl", tmp_path / ".x.beton.partial"
    if DAMAGES[damage]:
        journal.write_bytes(b"\n".join(DAMAGES[damage](journal.read_bytes().split(b"\n"))))
    else:
        os.truncate(partial, partial.stat().st_size // 2)
    pack(images, out, **OPTIONS)
    assert out.read_bytes() == pack(images, tmp_path / "whole.beton", **OPTIONS).read_bytes()


KILLED = """
import os, sys
from pathlib import Path
from moco_dist.data import beton
from moco_dist.datasets import pack, unfinished
pack.CHUNK, beton.PAGE_BYTES, unfinished.KEEP_EVERY_BYTES = 2, 4096, 1
original, count = pack._encode, []
def dies(*arguments):
    count.append(1)
    if len(count) == 6:
        os.kill(os.getpid(), 9)
    return original(*arguments)
pack._encode = dies
pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), max_side=30, raw_share=0.5)
"""


@pytest.mark.slow
def test_a_kill_costs_what_came_after_the_last_line(images, tmp_path, encoded):
    out = tmp_path / "x.beton"
    done = subprocess.run([sys.executable, "-c", KILLED, str(images), str(out)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert hidden(tmp_path) == [".x.beton.partial", ".x.beton.partial.jsonl"]
    pack(images, out, **OPTIONS)
    assert len(encoded) <= COUNT - 4 + 1  # two chunks were written; one that could not be read is looked at again
    assert out.read_bytes() == pack(images, tmp_path / "whole.beton", **OPTIONS).read_bytes()


def test_tar_shards_go_on_too(images, tmp_path, encoded):
    tars = tmp_path / "tars"
    for split in ("train", "val"):
        write_tar(tars / split / "000.tar", files_of(images / split))
    out = tmp_path / "x.beton"
    stopped(tars, out, encoded, 7)
    os.utime(next(tars.rglob("*.tar")), ns=(1, 1))
    pack(tars, out, **OPTIONS)
    assert len(encoded) == COUNT
    out.unlink()
    stopped(tars, out, encoded, 7)
    pack(tars, out, **OPTIONS)
    assert len(encoded) < COUNT
    assert out.read_bytes() == pack(tars, tmp_path / "whole.beton", **OPTIONS).read_bytes()


def test_two_commands_at_a_time(images, tmp_path, capsys):
    """The second one is refused, and harms nothing."""
    lock = LineFile(tmp_path / ".x.beton.partial.jsonl")
    assert main(["data", "pack", str(images), str(tmp_path / "x.beton")]) == EXIT_IN_USE
    assert "another process is packing" in capsys.readouterr().err
    lock.close()


def test_statuses_and_a_full_disk(images, tmp_path, encoded, capsys, monkeypatch):
    words = ["data", "pack", str(images), str(tmp_path / "x.beton")]
    encoded.stops_at = 5
    assert main(words) == EXIT_PREEMPTED
    original = packing.BetonWriter.add
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(packing.BetonWriter, "add",
                        lambda self, name, *rest: (_ for _ in ()).throw(full) if "/8" in name
                        else original(self, name, *rest))  # fmt: skip
    assert main(words) == EXIT_IO
    assert "No space left" in capsys.readouterr().err
    monkeypatch.setattr(packing.BetonWriter, "add", original)
    encoded.clear()
    assert main(words) == 0
    assert len(encoded) <= 4


def test_what_is_kept_is_bounded_by_bytes(images, tmp_path, monkeypatch):
    """A line is in the journal once so many bytes were added, not at the end alone."""
    kept = []
    monkeypatch.setattr(unfinished, "KEEP_EVERY_BYTES", 1)
    original = unfinished.Unfinished.keep
    monkeypatch.setattr(unfinished.Unfinished, "keep", lambda self: (kept.append(1), original(self)))
    pack(images, tmp_path / "x.beton")
    assert len(kept) >= COUNT // 2
