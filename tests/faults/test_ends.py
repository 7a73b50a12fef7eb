"""How ranks end when one of them does: each with the true reason, in one line, and a status of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.idle_rank import TIMEOUT_SECONDS
from tests.launch.machines import machines, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
on_hosts = pytest.param("hosts", marks=pytest.mark.skipif(why_not() is not None, reason=why_not() or ""))


class Ranks:
    """Two ranks of tests/faults/idle_rank.py, of this machine or of two."""

    def __init__(self, folder: Path, network) -> None:
        self.folder, self._network = folder, network
        self.hosts = [socket.gethostname()] * 2 if network is None else ["node1", "node2"]
        self._processes = []

    def start(self, *fates: str) -> None:
        """Each rank with its fate; returns when both have met."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in (0, 1):
            place = {
                "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port,
                "MASTER_ADDR": "localhost" if self._network is None else "node1", "OMP_NUM_THREADS": 1,
            }  # fmt: skip
            words = [sys.executable, "-m", "tests.faults.idle_rank", str(self.folder), *fates]
            if self._network is not None:
                words = self._network.command(self.hosts[rank], words)
            with (self.folder / f"{rank}.txt").open("w") as output:
                self._processes.append(
                    subprocess.Popen(words, env={**os.environ, **{name: str(v) for name, v in place.items()}},
                                     stdout=output, stderr=subprocess.STDOUT)
                )  # fmt: skip
        deadline = time.monotonic() + 60
        while not all((self.folder / f"met_{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline, self.said(0) + self.said(1)
            time.sleep(0.05)

    def signal(self, rank: int, signum: int) -> None:
        """To the rank itself; on a host of its own its number there is another."""
        if self._network is None:
            self._processes[rank].send_signal(signum)
        else:
            pid = (self.folder / f"met_{rank}").read_text()
            self._network.run(self.hosts[rank], ["kill", f"-{signum}", pid])

    def said(self, rank: int) -> str:
        """All of its output."""
        return (self.folder / f"{rank}.txt").read_text()

    def status(self, rank: int) -> int:
        return self._processes[rank].wait(60)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def ranks(tmp_path, request):
    where = getattr(request, "param", "here")
    with ExitStack() as stack:
        network = None
        if where == "hosts":
            network = stack.enter_context(machines(["node1", "node2"], tmp_path / "machines"))
        made = Ranks(tmp_path, network)
        stack.callback(made.kill)
        yield made


@pytest.mark.parametrize("ranks", ["here", on_hosts], indirect=True)
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_alone_says_why_and_the_other_says_it_too(ranks, failing):
    """The other sits in a collective that never returns, and so would whatever ends the failing one's group."""
    ranks.start(*(["in use", "stay"] if failing == 0 else ["stay", "in use"]))
    assert ranks.status(failing) == 73
    assert ranks.said(failing) == f"[rank {failing}] error: the folder is in use\n"
    assert ranks.status(1 - failing) == 69
    reason = f"rank {failing} on host {ranks.hosts[failing]} ended: the folder is in use"
    assert ranks.said(1 - failing) == f"[rank {1 - failing}] error: {reason}\n"


def test_an_error_that_nobody_has_foreseen_ends_its_rank_too(ranks):
    ranks.start("stay", "bug")
    assert ranks.status(1) == 1
    assert "KeyError: 'nobody has foreseen this'" in ranks.said(1)
    assert ranks.status(0) == 69
    assert re.search(r"rank 1 on host \S+ ended: 'nobody has foreseen this'", ranks.said(0))


@pytest.mark.parametrize("ranks", ["here", on_hosts], indirect=True)
def test_without_the_rank_that_holds_the_store_one_line_names_it(ranks):
    ranks.start("stay", "stay")
    ranks.signal(0, signal.SIGKILL)
    assert ranks.status(1) == 69
    expected = f"rank 0 on host {ranks.hosts[0]}, which holds the rendezvous store, has ended without a word"
    assert ranks.said(1) == f"[rank 1] error: {expected}\n"


def test_a_large_rank_that_is_killed_answers_for_a_while_to_nobody(ranks):
    """Until its memory is given back, its connections are open: the others' questions are lost when they close."""
    ranks.start("stay", "stay")
    ranks.signal(0, signal.SIGSTOP)
    time.sleep(TIMEOUT_SECONDS / 2)
    ranks.signal(0, signal.SIGKILL)
    assert ranks.status(1) == 69
    expected = f"rank 0 on host {ranks.hosts[0]}, which holds the rendezvous store, has ended without a word"
    assert ranks.said(1) == f"[rank 1] error: {expected}\n"


def test_an_abort_waits_for_the_name_of_the_rank_that_it_is_for(ranks):
    """NCCL's watchdog knows only that its collective does not return; the rank that is missing is found later."""
    ranks.start("abort", "stay")
    ranks.signal(1, signal.SIGSTOP)
    assert ranks.status(0) == 69
    assert re.search(rf"rank 1 on host \S+ has not been heard of for {TIMEOUT_SECONDS:g} s", ranks.said(0))


def test_an_abort_while_nobody_is_missing_is_one(ranks):
    ranks.start("stay", "abort")
    assert ranks.status(1) == 134
    assert "[rank 1] error: this rank was aborted, as its lines say, and no other rank is missing" in ranks.said(1)
    assert ranks.status(0) == 69
    assert re.search(r"rank 1 on host \S+ was aborted, as its lines say", ranks.said(0))


def test_time_in_which_all_were_stopped_does_not_count(ranks):
    ranks.start("stay", "stay")
    for _ in range(2):
        for rank in (1, 0):
            ranks.signal(rank, signal.SIGSTOP)
        time.sleep(2 * TIMEOUT_SECONDS)
        for rank in (0, 1):
            ranks.signal(rank, signal.SIGCONT)
        time.sleep(TIMEOUT_SECONDS / 6)
    (ranks.folder / "end").touch()
    assert [ranks.status(0), ranks.status(1)] == [0, 0], ranks.said(0) + ranks.said(1)
    assert ranks.said(0) + ranks.said(1) == ""
