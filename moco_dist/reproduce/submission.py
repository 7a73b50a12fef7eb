"""`moco-dist reproduce --launcher`: a table's rows as jobs of Slurm or Kubernetes, or by torchrun on several hosts.

What was submitted is noted in OUT/submitted.json, so that the same command, given again, submits nothing twice, and the
command without a launcher only collects.
"""

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from moco_dist.config.evaluate import LinearConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.errors import UserError, nearest
from moco_dist.files import write_whole
from moco_dist.launchers import kubernetes, slurm
from moco_dist.launchers.hosts import TorchrunOptions, torchrun_words
from moco_dist.launchers.job import Hosts, Job, check_paths, linear_evaluation, pretraining
from moco_dist.launchers.options import OPTIONS
from moco_dist.reproduce import tables as reproduce
from moco_dist.run.results import read_json

LAUNCHERS = tuple(name for name in OPTIONS if name != "local")  # where jobs are given to others


class Step(NamedTuple):
    """A row with one seed: its two commands, checked, as the launchers know jobs."""

    row: reproduce.Trial
    pretraining: Job
    config: PretrainConfig
    evaluation: Job
    evaluation_config: LinearConfig

    @property
    def name(self) -> str:
        """The name as a person reads it."""
        return f"{self.row.row.label}, seed {self.row.seed}"

    def left(self) -> tuple[Job, Job | None]:
        """What is to be run next, and what is to be run after that has ended well."""
        return (self.evaluation, None) if self.row.is_pretrained else (self.pretraining, self.evaluation)


def submit(trials: list[reproduce.Trial], launcher: str, words: list[str], out: Path, dry_run: bool) -> None:
    """Submit, or by torchrun run, what has no result yet; all rows are checked before the first is submitted.

    Args:
        trials: of the table.
        launcher: one of LAUNCHERS.
        words: the launcher's options.
        out: folder of the table.
        dry_run: print what would be submitted.

    Raises:
        UserError: a wrong launcher or option, sizes that do not fit, or what the cluster says.
    """
    if launcher not in LAUNCHERS:
        raise UserError(
            f"--launcher {launcher!r} is not one of {', '.join(LAUNCHERS)}{nearest(launcher, LAUNCHERS)}; for this "
            "machine alone there is --ranks"
        )
    options = read_config(OPTIONS[launcher], None, words)
    steps = [_step(trial, options) for trial in trials]
    if isinstance(options, kubernetes.KubernetesOptions):
        _to_kubernetes(steps, options, out, dry_run)
        return
    for config in {step.config.data.root: step.config for step in steps}.values():
        check_paths(config, dry_run)
    if isinstance(options, slurm.SlurmOptions):
        _to_slurm(steps, options, out, dry_run)
    else:
        _by_torchrun(steps, options, dry_run)


def submitted(out: Path) -> dict[str, list[str]]:
    """What OUT/submitted.json says: folder of the run, by its name, to the launcher and its jobs."""
    path = out / "submitted.json"
    return read_json(path, dict[str, list[str]], "remove it when none of its jobs is queued") if path.is_file() else {}


def _note(out: Path, step: Step, launcher: str, jobs: list[str]) -> None:
    known = {**submitted(out), step.row.run_dir.name: [launcher, *jobs]}
    write_whole(out / "submitted.json", json.dumps(known, indent=1).encode())


def _step(trial: reproduce.Trial, options: Hosts) -> Step:
    first, (_, linear, *_) = trial.commands
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), first[1:]))
    pretrain, config = pretraining([Path(file) for file in files], first[1 + len(files) :], options)
    return Step(trial, pretrain, config, *linear_evaluation(Path(linear), trial.run_dir, options))


def _unfinished(steps: list[Step], dry_run: bool) -> list[Step]:
    for step in steps:
        if step.row.result is not None and not dry_run:
            print(f"{step.name}: already done: {step.row.result:.2f} %")
    return [step for step in steps if step.row.result is None]


def _to_slurm(steps: list[Step], options: slurm.SlurmOptions, out: Path, dry_run: bool) -> None:
    """Each pre-training with its evaluation behind it; where it has ended, the evaluation alone."""
    queued = set()
    if not dry_run:
        slurm.require_partition(options)
        queued = slurm.waiting_or_running()
    for step in _unfinished(steps, dry_run):
        job, then = step.left()
        if dry_run:
            print("\n".join(slurm.script([part], options) for part in (job, then) if part is not None))
        elif still := [number for number in submitted(out).get(step.row.run_dir.name, [])[1:] if number in queued]:
            print(f"{step.name}: waits or runs as job {', '.join(still)}")
        else:
            numbers, lines = slurm.submit([job], [then] if then else [], options)
            _note(out, step, "slurm", numbers)
            print("\n".join([f"{step.name}:", *lines]))


def _to_kubernetes(steps: list[Step], options: kubernetes.KubernetesOptions, out: Path, dry_run: bool) -> None:
    """Pre-trainings; at a later call, evaluations of those that have ended: Kubernetes has no order among jobs."""
    manifests = []
    for step in _unfinished(steps, dry_run):
        job, then = step.left()
        config = step.config if then else step.evaluation_config
        manifests.append((step, job, kubernetes.manifest(job, config, options)))
    for number, (step, job, manifest) in enumerate(manifests):
        if dry_run:
            print(f"{'---' if number else ''}\n{manifest}".lstrip("\n"), end="")
        elif kubernetes.is_there(job, options):
            print(f"{step.name}: {job.name} is there already; when it has ended, give this command again")
        else:
            lines = kubernetes.submit(job, manifest, options)
            _note(out, step, "kubernetes", [job.name])
            print("\n".join([f"{step.name}:", *lines]))


def _by_torchrun(steps: list[Step], options: TorchrunOptions, dry_run: bool) -> None:
    """Run one after the other, in this terminal; every host is given the same command."""

    def launched(command: list[str]) -> list[str]:
        step = next(step for step in steps if command in step.row.commands)
        job = Job(tuple(command), step.row.run_dir, 0, options)
        return [sys.executable, "-m", "moco_dist.launchers.torchrun", *torchrun_words(job, options)]

    if dry_run:
        for command in itertools.chain.from_iterable(step.row.commands for step in steps):
            print(shlex.join(["python", *launched(command)[1:]]))
        return
    reproduce.run_trials([step.row for step in steps], launched)
