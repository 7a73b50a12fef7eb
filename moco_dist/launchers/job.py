"""What is to be run, checked before anybody is asked to run it."""

import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moco_dist.config.address import Url
from moco_dist.config.credentials import has_credentials
from moco_dist.config.evaluate import LinearConfig
from moco_dist.config.loading import without_pattern, worker_count
from moco_dist.config.pretrain import PretrainConfig, require_sizes
from moco_dist.config.section import Section, setting
from moco_dist.config.source import leaf_fields, read_config
from moco_dist.errors import UserError, nearest

MAX_NAME_LENGTH = 40  # Kubernetes puts it into host names, with a suffix


class Hosts(Section):
    """How many hosts and GPUs. 0 GPUs a host: one rank a host, on its CPU."""

    nodes: int = setting(1, "hosts", changes="place", ge=1)
    gpus_per_node: int = setting(1, "GPUs, and ranks, of each host; 0: one rank on CPU", changes="place", ge=0)

    @property
    def ranks_per_node(self) -> int:
        """Processes of one host."""
        return max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Job:
    """One `moco-dist` command of known size.

    Attributes:
        words: the command without `moco-dist`: pretrain CONFIG.yaml --section.key VALUE ...
        run_dir: folder of the run.
        num_workers: loader processes of each rank.
        size: hosts and GPUs.
    """

    words: tuple[str, ...]
    run_dir: Path
    num_workers: int
    size: Hosts

    @property
    def name(self) -> str:
        """The last part of the run's folder, in letters that every scheduler takes; an evaluation's says which."""
        letters = re.sub(r"[^a-z0-9]+", "-", self.run_dir.name.lower()).strip("-")[:MAX_NAME_LENGTH].strip("-")
        name = letters if letters[:1].isalpha() else f"run-{letters}".strip("-")
        return name if self.words[0] == "pretrain" else f"{name}-{self.words[0]}"

    @property
    def cpus_per_gpu(self) -> int:
        """One for each loader process of a rank, and one for itself."""
        return self.num_workers + 1


def pretraining(config_files: Sequence[Path], flags: list[str], size: Hosts) -> tuple[Job, PretrainConfig]:
    """A pre-training; later files go over earlier ones, and flags over all.

    Raises:
        UserError: a setting is wrong, or the sizes do not fit `size`; one line each.
    """
    config = read_config(PretrainConfig, config_files[0], flags, config_files[1:])
    require_sizes(config, size.world_size)
    words = ("pretrain", *map(str, config_files), *flags)
    return Job(words, config.run.dir, worker_count(config.data.num_workers, None), size), config


def linear_evaluation(config_file: Path, run_dir: Path, size: Hosts) -> tuple[Job, LinearConfig]:
    """The linear evaluation of the run in `run_dir`, on one host.

    Raises:
        UserError: a setting is wrong.
    """
    flags = ["--run-dir", str(run_dir)]
    config = read_config(LinearConfig, config_file, flags)
    one_node = Hosts(nodes=1, gpus_per_node=size.gpus_per_node)
    if config.global_batch_size < one_node.world_size:
        raise UserError(f"{config_file}: global_batch_size {config.global_batch_size} is less than one sample a GPU")
    words, num_workers = ("linear", str(config_file), *flags), worker_count(config.data.num_workers, None)
    return Job(words, run_dir, num_workers, one_node), config


def sweep(
    config_files: Sequence[Path], flags: list[str], axes: list[str], size: Hosts
) -> list[tuple[Job, PretrainConfig]]:
    """A pre-training for every combination of `axes`, each with a folder of its own beside run.dir.

    Args:
        config_files: YAML files.
        flags: settings over them.
        axes: `section.key=VALUE,VALUE,...` each; values with commas of their own are written as a YAML list.
        size: of each.

    Raises:
        UserError: an axis is not of this form, or a setting is wrong.
    """
    if not axes:
        return [pretraining(config_files, flags, size)]
    known = leaf_fields(PretrainConfig)
    columns = []
    for axis in axes:
        key, equals, values = axis.partition("=")
        if not equals or not values or key == "run.dir":
            raise UserError(f"--sweep {axis!r} is not of the form section.key=VALUE,VALUE (run.seed=0,1,2)")
        if key.replace("-", "_") not in known:
            raise UserError(f"--sweep {key} is not a setting{nearest(key, known)}")
        columns.append([(key, value) for value in re.split(r",(?![^\[]*\])", values)])
    _, base = pretraining(config_files, flags, size)
    jobs = []
    for choice in itertools.product(*columns):
        suffix = "_".join(f"{key.rsplit('.', 1)[-1]}{re.sub('[^A-Za-z0-9.-]+', '-', value)}" for key, value in choice)
        run_dir = base.run.dir.with_name(f"{base.run.dir.name}_{suffix}")
        chosen = [word for key, value in choice for word in (f"--{key.replace('_', '-')}", value)]
        jobs.append(pretraining(config_files, [*flags, *chosen, "--run.dir", str(run_dir)], size))
    if len({job.run_dir for job, _ in jobs}) < len(jobs):
        raise UserError(f"--sweep {' '.join(axes)} names a combination twice")
    return jobs


def refuse_credentials(words: Sequence[str], where: str) -> None:
    """Refuse passwords in what is rendered, since a scheduler keeps and shows it.

    Args:
        words: of a command, or of a config.
        where: what they would stand in.

    Raises:
        UserError: a word has a password or a token; the setting is named, not the word.
    """
    for before, word in zip(["", *words], words, strict=False):
        if has_credentials(word):
            given = word if word.startswith("-") else before
            name = given.partition("=")[0].partition(":")[0].removeprefix("--").replace("-", "_").strip()
            raise UserError(f"{name} has a password or token, which would stand in {where}")


def path_problems(config: PretrainConfig) -> list[str]:
    """What is not on this machine, and should be if the hosts share its file system."""
    problems = []
    root, run_dir = config.data.root, config.run.dir.absolute()
    if not isinstance(root, Url) and not without_pattern(root).exists():
        siblings = [path.name for path in root.parent.glob("*")]
        problems.append(f"data.root {root} does not exist{nearest(root.name, siblings)}")
    parent = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        problems.append(f"run.dir {config.run.dir} cannot be made: {parent} cannot be written")
    return problems


def check_paths(config: PretrainConfig, dry_run: bool) -> None:
    """Refuse paths that are not there. A dry run only warns: the hosts' file system may be another one.

    Raises:
        UserError: a path is not there, and this is no dry run.
    """
    problems = path_problems(config)
    if problems and not dry_run:
        raise UserError("\n".join(problems))
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
