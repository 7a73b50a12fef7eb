"""`moco-dist launch`: shows or starts what runs on one machine, on several, under Slurm or in Kubernetes."""

import itertools
import shlex
from pathlib import Path
from typing import NamedTuple

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import help_text, read_config
from moco_dist.errors import UserError, nearest
from moco_dist.launchers import kubernetes, slurm
from moco_dist.launchers.hosts import torchrun_words
from moco_dist.launchers.job import Hosts, Job, check_paths, linear_evaluation, refuse_credentials, sweep
from moco_dist.launchers.options import OPTIONS

USAGE = """usage: moco-dist launch local|torchrun|slurm|kubernetes CONFIG.yaml ... [options] [--section.key VALUE ...]

Checks the config against the number of hosts and GPUs, then starts the pre-training, and says how to follow, stop and
resume it. Flags with a dot are the pre-training's settings.

  --dry-run
        print what would run, and do nothing else
  --sweep section.key=VALUE,VALUE
        slurm: an array of jobs, one for every value; given again, for every combination
  --then linear CONFIG.yaml
        slurm: when the pre-training has ended well, its linear evaluation on one host
"""


class Request(NamedTuple):
    """The command line, taken apart."""

    config_files: list[Path]
    options: list[str]
    settings: list[str]
    axes: list[str]
    then: Path | None
    dry_run: bool


def main(words: list[str]) -> int:
    """Show or start a pre-training where the user says; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    where = words[0]
    if where not in OPTIONS:
        raise UserError(f"launch {where!r}: {', '.join(OPTIONS)} are possible{nearest(where, OPTIONS)}")
    if "-h" in words or "--help" in words:
        print(f"{USAGE}\nOptions of {where}:\n{help_text(OPTIONS[where])}\n\nSettings: moco-dist pretrain --help")
        return 0
    request = take_apart(words[1:])
    if where != "slurm" and (request.axes or request.then):
        raise UserError("--sweep and --then are Slurm's: moco-dist launch slurm ...")
    options = read_config(OPTIONS[where], None, request.options)
    pairs = sweep(request.config_files, request.settings, request.axes, options)
    jobs = [job for job, _ in pairs]
    if where == "kubernetes":
        return _kubernetes(jobs[0], pairs[0][1], options, request.dry_run)
    check_paths(pairs[0][1], request.dry_run)
    if where == "slurm":
        then = [linear_evaluation(request.then, job.run_dir, options)[0] for job in jobs] if request.then else []
        return _slurm(jobs, then, options, request.dry_run)
    return _here(jobs[0], options, request.dry_run)


def take_apart(words: list[str]) -> Request:
    """Sort the words by whom they are for.

    Raises:
        UserError: a word is nobody's, or a flag lacks its value.
    """
    files = [Path(word) for word in itertools.takewhile(lambda word: not word.startswith("-"), words)]
    rest = words[len(files) :]
    if not files:
        raise UserError("launch needs a config file: moco-dist launch WHERE CONFIG.yaml ...")
    options, settings, axes = [], [], []
    then, dry_run = None, False
    rest.reverse()
    while rest:
        word = rest.pop()
        if word == "--dry-run":
            dry_run = True
        elif word == "--then":
            if len(rest) < 2 or rest.pop() != "linear":
                raise UserError("--then is followed by `linear` and its config: --then linear CONFIG.yaml")
            then = Path(rest.pop())
        elif word == "--sweep":
            if not rest:
                raise UserError("--sweep is followed by section.key=VALUE,VALUE")
            axes.append(rest.pop())
        else:
            target = settings if "." in word.split("=")[0] else options
            target.append(word)
            if word.startswith("--") and "=" not in word and rest:
                target.append(rest.pop())
    return Request(files, options, settings, axes, then, dry_run)


def _here(job: Job, options: Hosts, dry_run: bool) -> int:
    words = torchrun_words(job, options)
    if dry_run:
        refuse_credentials(words, "a command that is shown; export MLFLOW_TRACKING_URI instead")
        print(shlex.join(["python", "-m", "moco_dist.launchers.torchrun", *words]))
        return 0
    from moco_dist.launchers.torchrun import torchrun

    return torchrun(words)


def _slurm(jobs: list[Job], then: list[Job], options: slurm.SlurmOptions, dry_run: bool) -> int:
    if dry_run:
        print(slurm.script(jobs, options), end="")
        if then:
            print("\n# ---- the second script, submitted with --dependency on the first ----\n")
            print(slurm.script(then, options), end="")
        return 0
    slurm.require_partition(options)
    print("\n".join(slurm.submit(jobs, then, options)[1]))
    return 0


def _kubernetes(job: Job, config: PretrainConfig, options: kubernetes.KubernetesOptions, dry_run: bool) -> int:
    manifest = kubernetes.manifest(job, config, options)
    if dry_run:
        print(manifest, end="")
        return 0
    kubernetes.require_what_pods_wait_for(config, options)
    print("\n".join(kubernetes.submit(job, manifest, options)))
    return 0
