"""Standard output and error that cannot be written: a full disk, a closed descriptor, a reader that is gone."""

import json
import os
import subprocess
import sys

import pytest

from moco_dist.run.folder import RunFolder
from tests.faults.processes import command

NOWHERE = {
    "a full disk": '"$@" > /dev/full 2> /dev/full',
    "closed": '"$@" <&- >&- 2>&-',
    "a reader that is gone": 'set -o pipefail; "$@" 2>&1 | true',
}


def status(redirected, words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", redirected, "bash", *words], env=environment, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("where", NOWHERE)
def test_a_training_goes_on_without_anybody_to_tell(tiny_data, tmp_path, where):
    run = RunFolder(tmp_path / "run")
    flags = ["--run.stop-at-step", "4", "--data.num-workers", "1"]
    assert status(NOWHERE[where], command(tiny_data, run.root, *flags, ranks=1)) == 0
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]  # and no line of another file
    assert [row["step"] for row in rows] == [2, 4]
    assert run.backbone.is_file()


@pytest.mark.parametrize(
    ("words", "redirected", "expected"),
    [
        (["pretrain", "--nonsense", "1"], '"$@" 2> /dev/full', 2),
        (["pretrain", "--nonsense", "1"], '"$@" <&- >&- 2>&-', 2),
        (["data", "prepare", "imagefolder", "--source", "DATA", "--out", "OUT"], '"$@" > /dev/full', 0),
        (["data", "views", "configs/demo.yaml", "--data.root", "DATA", "--out", "OUT.png"], '"$@" > /dev/full', 0),
        (["--version"], '"$@" 2> /dev/full > /dev/null', 0),
        (["--version"], '"$@" >&- 2>&-', 0),
        (["--version"], '"$@" > /dev/full 2> /dev/null', 74),  # what it prints is all that it is for
    ],
)
def test_a_command_keeps_its_status(tiny_data, tmp_path, words, redirected, expected):
    places = {"DATA": str(tiny_data), "OUT": str(tmp_path / "out"), "OUT.png": str(tmp_path / "out.png")}
    words = [places.get(word, word) for word in words]
    assert status(redirected, [sys.executable, "-m", "moco_dist", *words]) == expected


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_no_line_waits_in_memory(unbuffered):
    """A rank that is killed has said what it had to say."""
    script = (
        "import os, sys; from moco_dist.cli.streams import let_lines_be_lost as lose; lose('stderr'); "
        "print('said', file=sys.stderr); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, stderr=subprocess.PIPE,
        check=False,
    )  # fmt: skip
    assert done.stderr == b"said\n"
