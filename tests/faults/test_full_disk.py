"""A disk that is really full, for a while: training goes on, and nothing is missing once there is room again."""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from moco_dist.run.checkpoint import complete_checkpoints
from tests.faults.processes import command, steps_logged

ON_A_DISK = 'mount -t tmpfs -o size=200m tmpfs "$0" && exec "$@"'  # of a checkpoint's size of 60 MB


def why_not():
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return None if os.geteuid() == 0 and done.returncode == 0 else "a mount of its own needs root"


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_training_goes_on_and_catches_up(tiny_data, tmp_path):
    mount, output = tmp_path / "disk", tmp_path / "output.txt"
    mount.mkdir()
    words = command(
        tiny_data, mount / "run", "--log.every-steps", "1", "--checkpoint.every-steps", "10", "--optim.epochs", "1000",
        "--tracking.backend", "mlflow", "--tracking.uri", "http://localhost:1", ranks=1,
    )  # fmt: skip
    with output.open("w") as file:
        process = subprocess.Popen(["unshare", "--mount", "sh", "-c", ON_A_DISK, str(mount), *words],
                                   env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   stdout=file, stderr=subprocess.STDOUT)  # fmt: skip
    disk = Path(f"/proc/{process.pid}/root{mount}")  # as it is seen from outside
    run_dir = disk / "run"

    def wait_until(condition):
        while not condition():
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)

    def all_told():
        fill(disk)
        text = output.read_text()
        return all(f"{name} cannot be written: no space left" in text for name in ("log.jsonl", "pretrain.jsonl")) and (
            "no space left on device; training goes on, and the next interval tries again" in text
        )

    try:
        wait_until(lambda: complete_checkpoints(run_dir))
        wait_until(all_told)
        before = steps_logged(run_dir), int(complete_checkpoints(run_dir)[-1].name.removeprefix("step_"))
        (disk / "filler").unlink()
        wait_until(lambda: complete_checkpoints(run_dir)[-1].name > f"step_{before[1]:08d}")
        wait_until(lambda: steps_logged(run_dir) > before[0])
        log = [json.loads(line)["step"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
        journal = map(json.loads, (run_dir / "mlflow" / "pretrain.jsonl").read_text().splitlines())
        tracked = [record["step"] for record in journal if "metrics" in record]
    finally:
        process.kill()
        process.wait()
    assert log == list(range(1, len(log) + 1))
    assert tracked == list(range(1, len(tracked) + 1))
    assert len(log) > before[0]
