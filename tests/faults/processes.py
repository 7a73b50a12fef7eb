"""The real command, tiny, as a process that tests can watch and hurt."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

TINY = [
    "--data.image-size", "32", "--data.num-workers", "0", "--model.arch", "resnet10",
    "--model.head-hidden-dims", "[16]", "--model.bn-group-size", "4", "--moco.queue-size", "64",
    "--optim.global-batch-size", "8", "--optim.epochs", "100", "--log.every-steps", "2",
    "--tracking.backend", "none", "--run.peer-timeout-seconds", "4",
]  # fmt: skip


def command(data: Path, run_dir: Path, *flags: str, ranks: int = 2, torchrun: tuple[str, ...] = ()) -> list[str]:
    """`moco-dist pretrain` as a user starts it."""
    words = [sys.executable, "-m"]
    if ranks > 1:
        words += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *torchrun, "-m"]
    return [*words, "moco_dist", "pretrain", "--data.root", str(data), "--run.dir", str(run_dir), *TINY, *flags]


def steps_logged(run_dir: Path) -> int:
    log = run_dir / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    while steps_logged(run_dir) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def rank_processes(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks under a torchrun, in order."""
    ranks = {}
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended: torchrun starts helpers too
            # A child that torchrun has just forked has its words and not yet its own environment.
            if "moco_dist" in " ".join(child.cmdline()) and "RANK" in (env := child.environ()):
                ranks[int(env["RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}
