"""The manifests' own command and environment on two machines: to the end, evicted, and with a mistake."""

import contextlib
import re
import shutil

import pytest

from moco_dist.cli.main import main
from tests.launch.machines import machines, why_not
from tests.launch.pods import Pods
from tests.launch.small import last_step, wait_for_step, write_configs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
reason = why_not() or (None if shutil.which("tini") else "tini is not installed (Debian: tini)")
if reason:
    pytestmark.append(pytest.mark.skip(reason=f"no machines for pods: {reason}"))
ROOT = ["--data.root", "/data/shapes"]


@pytest.fixture
def pods(tmp_path, capsys):
    """A function of launch's flags that makes the machines for the pods."""
    config = write_configs(tmp_path)
    (tmp_path / "runs").mkdir()
    with contextlib.ExitStack() as stack:

        def make(*flags):
            words = ["--nodes", "2", "--gpus-per-node", "0", "--image", "x", "--run.dir", "/runs/small", *flags]
            capsys.readouterr()
            assert main(["launch", "kubernetes", str(config), *words, "--dry-run"]) == 0
            volumes = {"data": tmp_path / "data", "runs": tmp_path / "runs"}
            made = Pods(capsys.readouterr().out, volumes, tmp_path)
            made.machines = stack.enter_context(machines(made.names, tmp_path / "machines", made.aliases))
            return made

        yield make


@pytest.mark.parametrize("form", ["trainjob", "indexed-job"])
def test_to_the_end(pods, tmp_path, form):
    made = pods("--form", form, *ROOT, "--run.stop-at-step", "4")
    started = [made.start(index) for index in (0, 1)]
    logs = [made.log(index) for index in (0, 1)]
    assert [pod.wait() for pod in started] == [0, 0], [log.read_text() for log in logs]
    assert last_step(tmp_path / "runs" / "small") == 4
    assert "on 2 rank(s)" in logs[0].read_text()
    assert "done: /runs/small" in logs[0].read_text()


def test_an_evicted_pod_has_all_save_and_go_on(pods, tmp_path):
    made = pods("--form", "indexed-job", *ROOT)
    run_dir = tmp_path / "runs" / "small"
    first, second = made.start(0), made.start(1)
    wait_for_step(run_dir, 6, tell=lambda: made.log(0).read_text() + made.log(1).read_text())
    made.evict(second)
    status = first.wait(60)
    assert status == 75, made.log(0).read_text()
    assert made.action(status) == "Ignore"
    step = re.search(r"stopped: saved at step (\d+)", made.log(0).read_text())[1]
    made.start(0), made.start(1)
    wait_for_step(run_dir, int(step) + 4, tell=lambda: made.log(0).read_text())
    assert f"goes on at step {step}" in made.log(0).read_text()


def test_a_mistake_fails_the_job(pods):
    made = pods("--form", "indexed-job", "--data.root", "/data/shaeps")
    started = [made.start(index) for index in (0, 1)]
    statuses = [pod.wait() for pod in started]
    text = made.log(0).read_text()
    assert 2 in statuses, text
    assert made.action(2) == "FailJob"
    assert "/data/shaeps" in text
