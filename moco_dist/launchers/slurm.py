"""Slurm: a job script that saves and queues itself again, and its submission."""

import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from moco_dist.config.section import setting
from moco_dist.errors import (
    CAUSES,
    EXIT_ABORTED,
    EXIT_IN_USE,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_KILLED,
    EXIT_MISTAKE,
    EXIT_PREEMPTED,
    EXIT_TERMINATED,
    EXIT_UNREACHABLE,
    UnreachableError,
    UserError,
    nearest,
)
from moco_dist.launchers.job import Hosts, Job, refuse_credentials
from moco_dist.launchers.render import render

# What Slurm's commands say where its controller does not answer.
NO_CONTROLLER = re.compile(
    r"unable to contact|connection (refused|timed out|failure)|connect failure|timed out|zero bytes", re.IGNORECASE
)


class SlurmOptions(Hosts):
    """`moco-dist launch slurm`: what sbatch is told."""

    partition: str | None = setting(None, "queue of the cluster; default: Slurm's", changes="place")
    account: str | None = setting(None, "who pays", changes="place")
    hours: float | None = setting(
        None,
        "time limit of one go: the run saves before it and is queued again; default: the partition's",
        changes="place",
        unit="hours",
        gt=0,
    )
    cpus_per_gpu: int | None = setting(
        None, "CPU cores for each rank; default: its loader processes and one", changes="place", gt=0
    )
    sbatch: tuple[str, ...] = setting(
        (), "more #SBATCH options: --sbatch=--mem=0, or --sbatch='[--mem=0, --constraint=h100]'", changes="place"
    )
    python: str = setting(sys.executable, "Python on the hosts; default: the one that runs this", changes="place")


def script(jobs: list[Job], options: SlurmOptions) -> str:
    """The job script of one job, or of an array of them, one a task.

    Raises:
        UserError: a word of a job, or an option of sbatch, has a password that everybody could read.
    """
    where = "a job script that others can read; export MLFLOW_TRACKING_URI instead: sbatch hands your environment on"
    for words in (options.sbatch, *(one.words for one in jobs)):
        refuse_credentials(words, where)
    job = jobs[0]
    lines = [*options.sbatch]
    for name, value in (("partition", options.partition), ("account", options.account)):
        lines += [f"--{name}={value}"] if value else []
    if options.hours:
        minutes = math.ceil(options.hours * 60)
        lines.append(f"--time={minutes // 60:02d}:{minutes % 60:02d}:00")
    if len(jobs) > 1:
        lines.append(f"--array=0-{len(jobs) - 1}")
    cpus_per_gpu = options.cpus_per_gpu or job.cpus_per_gpu
    return render(
        "job.sbatch",
        title=_title(jobs),
        name=job.name,
        size=job.size,
        cpus_per_node=cpus_per_gpu * job.size.ranks_per_node,
        sbatch_lines=lines,
        output=log_pattern(jobs),
        output_folder=jobs[0].run_dir.parent,
        jobs=jobs,
        python=options.python,
        causes=CAUSES,
        mistake=EXIT_MISTAKE,
        lost=EXIT_UNREACHABLE,
        io=EXIT_IO,
        preempted=EXIT_PREEMPTED,
        in_use=EXIT_IN_USE,
        killed=(EXIT_ABORTED, EXIT_KILLED),
        ended=(EXIT_INTERRUPTED, EXIT_TERMINATED),
    )


def _title(jobs: list[Job]) -> str:
    what = f"moco-dist {jobs[0].words[0]}" + (f", {len(jobs)} settings of it," if len(jobs) > 1 else "")
    size = jobs[0].size
    return f"{what} on {size.nodes} host(s) x {size.ranks_per_node} {'GPU' if size.gpus_per_node else 'CPU'} rank(s)"


def log_pattern(jobs: list[Job]) -> str:
    """Where the output goes, in sbatch's words: beside the run's folder, since each attempt adds to it."""
    parent = str(jobs[0].run_dir.parent).replace("%", "%%")
    return f"{parent}/{jobs[0].words[0]}-%x-{'%A_%a' if len(jobs) > 1 else '%j'}.out"


def require_partition(options: SlurmOptions) -> None:
    """Ask the cluster whether it has the partition, long enough, with enough hosts.

    Raises:
        UserError: it has not, or this is not a host of a cluster.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not here; run this on a login host of the cluster, or take the script of --dry-run")
    listed = _run(["sinfo", "--noheader", "--format=%R|%D|%l"])
    partitions = {row[0]: row for row in (line.split("|") for line in listed.splitlines())}
    if options.partition is None:
        return
    if options.partition not in partitions:
        known = ", ".join(partitions)
        hint = nearest(options.partition, partitions)
        raise UserError(f"partition {options.partition} does not exist; {known} do{hint}")
    _, hosts, limit = partitions[options.partition]
    if options.nodes > int(hosts):
        raise UserError(f"nodes {options.nodes} is more than partition {options.partition} has: {hosts}")
    if options.hours and (most := limit_hours(limit)) is not None and options.hours > most:
        raise UserError(
            f"hours {options.hours:g} is more than partition {options.partition} allows: {most:g}; a run that needs "
            "more goes on by itself after each time limit"
        )


def limit_hours(text: str) -> float | None:
    """Slurm's [DAYS-]HOURS:MINUTES:SECONDS or MINUTES:SECONDS in hours; None if it is infinite."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 24 + hours + minutes / 60 + seconds / 3600


def submit(jobs: list[Job], then: list[Job], options: SlurmOptions) -> tuple[list[str], list[str]]:
    """Give the jobs to Slurm, and to each its evaluation in `then`, to start when it has ended well.

    Returns:
        their numbers, and what to tell the user.

    Raises:
        UserError: Slurm refuses.
    """
    jobs[0].run_dir.parent.mkdir(parents=True, exist_ok=True)  # where the output goes
    number = _sbatch(script(jobs, options), [])
    numbers, lines = [number], how_to(jobs, number)
    if then:
        after = "aftercorr" if len(jobs) > 1 else "afterok"  # aftercorr: task by task
        evaluation = _sbatch(script(then, options), [f"--dependency={after}:{number}", "--kill-on-invalid-dep=yes"])
        numbers.append(evaluation)
        lines.append(f"then {then[0].words[0]}: job {evaluation}, after job {number}")
    return numbers, lines


def waiting_or_running() -> set[str]:
    """The numbers of this user's jobs that have not ended.

    Raises:
        UserError: Slurm does not answer.
    """
    return set(_run(["squeue", "--me", "--noheader", "--format=%A"]).split())


def how_to(jobs: list[Job], number: str) -> list[str]:
    """How to follow, stop and resume job `number`."""
    log = log_pattern(jobs).replace("%%", "%").replace("%x", jobs[0].name)
    log = log.replace("%A_%a", f"{number}_0").replace("%j", number)
    return [
        f"job {number}: {jobs[0].name}" + (f", {len(jobs)} tasks" if len(jobs) > 1 else ""),
        f"follow:  tail -F {shlex.quote(log)}    squeue --job {number}",
        f"stop:    scancel {number}    (it saves if that takes less than the cluster's KillWait)",
        "resume:  the same command again; it goes on from the newest checkpoint",
    ]


def _sbatch(text: str, flags: list[str]) -> str:
    return _run(["sbatch", "--parsable", *flags], text).strip().split(";")[0]


def _run(words: list[str], text: str | None = None) -> str:
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        text = f"{Path(words[0]).name}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}"
        raise (UnreachableError if NO_CONTROLLER.search(done.stderr) else UserError)(text)
    return done.stdout
