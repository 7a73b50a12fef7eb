"""The rendered job script under a real slurmctld and slurmd, on three hosts of this machine."""

import json
import re
import sys

import pytest

from tests.launch.cluster import cluster, why_not
from tests.launch.small import last_step, wait_for_step, write_configs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
if reason := why_not():
    pytestmark.append(pytest.mark.skip(reason=f"no Slurm cluster: {reason}"))
LAUNCH = [sys.executable, "-m", "moco_dist", "launch", "slurm"]
TWO = ["--nodes", "2", "--gpus-per-node", "1"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as made:
        yield made


@pytest.fixture
def config(tmp_path):
    return write_configs(tmp_path)


@pytest.fixture
def submitted(slurm):
    """Job numbers, cancelled at the end."""
    numbers = []
    yield numbers
    for number in numbers:
        slurm.run(["scancel", "--signal=KILL", number])  # ranks that are only told to end would save first
        slurm.run(["scancel", number])
        slurm.wait(number, lambda job: job["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"), 60)


def launch(slurm, *words):
    done = slurm.run([*LAUNCH, *map(str, words)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def output(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("runs/*.out")))


def test_two_hosts_to_the_end_then_linear(slurm, config, submitted):
    folder = config.parent
    told = launch(slurm, config, *TWO, "--run.stop-at-step", 6, "--then", "linear", folder / "linear.yaml")
    number, evaluation = re.search(r"job (\d+): small", told)[1], re.search(r"then linear: job (\d+)", told)[1]
    submitted += [number, evaluation]
    job = slurm.wait(number, lambda job: job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    assert job["JobState"] == "COMPLETED", output(folder)
    assert job["NumNodes"] == "2"
    assert last_step(folder / "runs" / "small") == 6
    assert re.search(r"on 2 rank\(s\)", output(folder))
    assert f"tail -F {folder}/runs/pretrain-small-{number}.out" in told
    assert (folder / "runs" / f"pretrain-small-{number}.out").is_file()
    job = slurm.wait(evaluation, lambda job: job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    assert job["JobState"] == "COMPLETED", output(folder)
    assert json.loads(next((folder / "runs" / "small" / "eval").glob("linear*.json")).read_text())["accuracy"]


def test_one_run_for_each_value_of_a_sweep(slurm, config, submitted):
    folder = config.parent
    told = launch(slurm, config, "--run.stop-at-step", 4, "--sweep", "run.seed=0,1", "--hours", 1)
    number = re.search(r"job (\d+): small-seed0, 2 tasks", told)[1]
    submitted.append(number)
    for seed in (0, 1):
        job = slurm.wait(f"{number}_{seed}", lambda job: job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
        assert job["JobState"] == "COMPLETED", output(folder)
        assert job["TimeLimit"] == "01:00:00"
        run_dir = folder / "runs" / f"small_seed{seed}"
        assert last_step(run_dir) == 4
        assert f"seed: {seed}\n" in (run_dir / "config.yaml").read_text()


def test_time_limit_ends_and_goes_on(slurm, config, submitted):
    """Slurm counts in minutes and may signal up to one early, so a slow machine may not have trained by then."""
    folder, run_dir = config.parent, config.parent / "runs" / "small"
    script = slurm.run([*LAUNCH, str(config), *TWO, "--dry-run"]).stdout
    run_dir.parent.mkdir()
    done = slurm.run(["sbatch", "--parsable", "--time=1", "--signal=B:USR1@35"], input=script)
    number = done.stdout.strip()
    submitted.append(number)
    slurm.wait(number, lambda job: job.get("Restarts") == "1", 90, lambda: output(folder))
    slurm.run(["scontrol", "update", f"JobId={number}", "TimeLimit=60"])  # or it is signalled again as it starts
    saved = re.search(r"stopped: saved at step (\d+)", output(folder))
    assert "preempted: queued again" in output(folder)
    wait_for_step(run_dir, (int(saved[1]) if saved else 0) + 4, tell=lambda: output(folder))


def test_asked_to_end_it_is_queued_again_whether_it_has_trained_or_not(slurm, config, submitted):
    folder, run_dir = config.parent, config.parent / "runs" / "small"
    number = re.search(r"job (\d+)", launch(slurm, config, *TWO))[1]
    submitted.append(number)
    # A job is RUNNING a moment before its script is, and Slurm loses a signal to a script that does not run yet.
    begun = folder / "runs" / f".statuses-{number}-0"
    slurm.wait(number, lambda job: begun.is_dir(), 90, lambda: output(folder))
    slurm.run(["scancel", "--batch", "--signal=USR1", number])
    slurm.wait(number, lambda job: job.get("Restarts") == "1", 90, lambda: output(folder))
    assert "stopped: saved" not in output(folder)  # the step had hardly begun

    wait_for_step(run_dir, 4, tell=lambda: output(folder))
    slurm.run(["scancel", "--batch", "--signal=USR1", number])
    slurm.wait(number, lambda job: job.get("Restarts") == "2", 90, lambda: output(folder))
    saved = re.search(r"stopped: saved at step (\d+)", output(folder))
    assert saved, output(folder)
    assert output(folder).count("preempted: queued again") == 2
    wait_for_step(run_dir, int(saved[1]) + 4, tell=lambda: output(folder))
    assert f"goes on at step {saved[1]}" in output(folder)


def test_requeued_it_goes_on_and_cancelled_it_stays(slurm, config, submitted):
    folder, run_dir = config.parent, config.parent / "runs" / "small"
    number = re.search(r"job (\d+)", launch(slurm, config, *TWO))[1]
    submitted.append(number)
    wait_for_step(run_dir, 4, tell=lambda: output(folder))
    assert slurm.run(["scontrol", "requeue", number]).returncode == 0
    slurm.wait(number, lambda job: job.get("Restarts") == "1" and job["JobState"] == "RUNNING")
    stopped_at = last_step(run_dir)
    wait_for_step(run_dir, stopped_at + 4, tell=lambda: output(folder))
    assert re.search(r"goes on at step \d+", output(folder))

    slurm.run(["scancel", number])
    job = slurm.wait(number, lambda job: job["JobState"] not in ("RUNNING", "COMPLETING"))
    assert job["JobState"] == "CANCELLED", output(folder)
    assert (run_dir / "preempted.json").is_file(), output(folder)  # it saved, and was not queued again


def test_a_mistake_that_one_host_sees_is_not_queued_again(slurm, config, submitted):
    """There it is a mistake (2), on the other host a lost rank (69), which srun returns."""
    folder = config.parent
    image = next(path for path in sorted((folder / "data" / "shapes" / "train").rglob("*")) if path.is_file())
    image.write_bytes(b"no image")
    number = re.search(r"job (\d+)", launch(slurm, config, *TWO))[1]
    submitted.append(number)
    job = slurm.wait(number, lambda job: job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), output(folder)
    assert re.search(r"rank \d on host node\d ended: cannot read image", output(folder))
    assert "queued again" not in output(folder)
    assert not list((folder / "runs").glob(".statuses*"))


def test_a_job_that_is_given_twice_is_refused_once(slurm, config, submitted):
    folder, run_dir = config.parent, config.parent / "runs" / "small"
    number = re.search(r"job (\d+)", launch(slurm, config, *TWO, "--sbatch=--nodelist=node[1-2]"))[1]
    submitted.append(number)
    wait_for_step(run_dir, 4, tell=lambda: output(folder))
    second = re.search(r"job (\d+)", launch(slurm, config, *TWO, "--sbatch=--nodelist=node[1-2]"))[1]
    submitted.append(second)
    job = slurm.wait(second, lambda job: job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "73:0"), output(folder)
    assert f"run.dir {run_dir} is in use by process" in output(folder)
    assert slurm.job(number)["JobState"] == "RUNNING"


def test_a_host_that_dies(slurm, config, submitted):
    """The last test: node2 stays dead."""
    folder, run_dir = config.parent, config.parent / "runs" / "small"
    number = re.search(r"job (\d+)", launch(slurm, config, *TWO))[1]
    submitted.append(number)
    wait_for_step(run_dir, 12, tell=lambda: output(folder))
    assert slurm.job(number)["NodeList"] == "node[1-2]"
    slurm.machines.cut_power("node2")
    slurm.wait(number, lambda job: job.get("Restarts") == "1" and job["JobState"] == "RUNNING")
    assert slurm.job(number)["NodeList"] == "node[1,3]"
    stopped_at = last_step(run_dir)
    wait_for_step(run_dir, stopped_at + 4, tell=lambda: output(folder))
    assert re.search(r"goes on at step \d+", output(folder))


def test_what_the_cluster_cannot_do_is_said_before(slurm, config):
    for words, line in (
        (["--partition", "gpus"], "error: partition gpus does not exist; gpu do; did you mean gpu?"),
        (["--partition", "gpu", "--nodes", "4", "--optim.global-batch-size", "16"], "partition gpu has: 3"),
        (["--partition", "gpu", "--hours", "72"], "hours 72 is more than partition gpu allows: 48"),
    ):
        done = slurm.run([*LAUNCH, str(config), *words])
        assert done.returncode == 2
        assert line in done.stderr
    assert slurm.run(["squeue", "-h"]).stdout == ""
