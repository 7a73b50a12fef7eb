"""The paper's tables (arXiv 2003.04297), row by row: which runs they are, running them, and ours beside the published.

A row is a config of configs/ with some flags, pre-trained and evaluated by the same commands that a person would type,
as processes of their own. What was interrupted goes on: a run from its newest checkpoint, a table from its first row
that has no result.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moco_dist.config.address import Url
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.errors import UserError
from moco_dist.run.folder import RunFolder
from moco_dist.run.results import Result, read_json
from moco_dist.tracking import page_of

SMALL_EPOCHS = 6  # for a row of 200 at `--scale small`
SMALL_BATCH = 512  # at most, there
MISSING = "–"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: of its runs' folders.
        label: as the paper calls it.
        config: file of configs/, without ending.
        published: ImageNet linear top-1 in percent, of the paper.
        flags: over the config.
    """

    name: str
    label: str
    config: str
    published: float
    flags: tuple[str, ...] = ()


def _temperature_rows() -> Iterator[Row]:
    published = {
        "linear": ("mocov1_r50_200ep", (60.6, 60.7, 59.0, 58.2, 57.2, 56.4)),
        "mlp": ("mocov2_a_r50_200ep", (62.9, 64.9, 66.2, 65.7, 65.0, 64.3)),
    }
    for head, (config, accuracies) in published.items():
        for tau, accuracy in zip((0.07, 0.1, 0.2, 0.3, 0.4, 0.5), accuracies, strict=True):
            flags = ("--moco.temperature", str(tau))
            yield Row(f"{head}_tau{tau:g}", f"{head} head, τ {tau:g}", config, accuracy, flags)


TABLES = {
    "table1": [
        Row("mocov1", "MoCo v1", "mocov1_r50_200ep", 60.6),
        Row("a", "(a) MLP", "mocov2_a_r50_200ep", 66.2),
        Row("b", "(b) aug+", "mocov2_b_r50_200ep", 63.4),
        Row("c", "(c) MLP, aug+", "mocov2_c_r50_200ep", 67.3),
        Row("d", "(d) MLP, aug+, cos", "mocov2_r50_200ep", 67.5),
        Row("e", "(e) MLP, aug+, cos, 4 x the epochs", "mocov2_r50_800ep", 71.1),
    ],
    "temperature": list(_temperature_rows()),
    "table2": [
        Row("simclr_b256", "SimCLR, batch 256", "simclr_r50_b256_200ep", 61.9),
        Row("simclr_b8192", "SimCLR, batch 8,192", "simclr_r50_b8192_200ep", 66.6),
        Row("mocov2", "MoCo v2, batch 256", "mocov2_r50_200ep", 67.5),
        Row("simclr_b4096_1000ep", "SimCLR, batch 4,096, 1,000 epochs", "simclr_r50_b4096_1000ep", 69.3),
        Row("mocov2_800ep", "MoCo v2, batch 256, 800 epochs", "mocov2_r50_800ep", 71.1),
    ],
}


@dataclass(frozen=True)
class Trial:
    """One row with one seed: two commands for `python -m moco_dist`.

    Attributes:
        row: what it reproduces.
        seed: of the pre-training.
        run_dir: folder of the run.
        commands: pre-training, linear evaluation.
    """

    row: Row
    seed: int
    run_dir: Path
    commands: tuple[list[str], list[str]]

    @property
    def result(self) -> float | None:
        """Linear top-1 in percent; None until it is evaluated."""
        path = RunFolder(self.run_dir).result("linear", "trained")
        if not path.is_file():
            return None
        return read_json(path, Result, "remove it, and run this again")["accuracy"].get("linear_top1")

    @property
    def is_pretrained(self) -> bool:
        """Whether the pre-training has come to its end."""
        return RunFolder(self.run_dir).backbone.is_file()


def trials_of(
    table: str, scale: str, seeds: list[int], out: Path, configs: Path, data_root: Path | Url | None, small_epochs: int
) -> list[Trial]:
    """A table's trials, in its order.

    Args:
        table: one of TABLES.
        scale: `full`, as published; `small`, configs/reproduce_small.yaml over every row and `small_epochs` for 200.
        seeds: one run of each row for each.
        out: folder for the runs and the table.
        configs: folder of the configs; `Path()` for those that come with the package.
        data_root: images; None: those of the config.
        small_epochs: epochs for each 200 of the row, at `--scale small`.

    Raises:
        UserError: a config is missing or does not fit.
    """
    trials = []
    for row in TABLES[table]:
        config = configs / f"{row.config}.yaml"
        optim = read_config(PretrainConfig, config, []).optim
        for seed in seeds:
            run_dir = out / f"{row.name}_seed{seed}"
            files, flags = [str(config)], [*row.flags, "--run.dir", str(run_dir), "--run.seed", str(seed)]
            linear = "linear_r50_100ep"
            if scale == "small":
                files.append(str(configs / "reproduce_small.yaml"))
                length = round(optim.epochs * small_epochs / 200)
                milestones = [max(1, round(share * length)) for share in (0.6, 0.8)]
                batch = min(SMALL_BATCH, optim.global_batch_size // 2)
                flags += ["--optim.epochs", str(length), "--optim.milestones", str(milestones),
                          "--optim.global-batch-size", str(batch)]  # fmt: skip
                linear = "reproduce_small_linear"
            if data_root is not None:
                flags += ["--data.root", str(data_root)]
            evaluation = ["linear", str(configs / f"{linear}.yaml"), "--run-dir", str(run_dir)]
            trials.append(Trial(row, seed, run_dir, (["pretrain", *files, *flags], evaluation)))
    return trials


def run_trials(trials: list[Trial], launched: Callable[[list[str]], list[str]]) -> None:
    """Run what has no result yet, one command after the other.

    Args:
        trials: of a table.
        launched: the words of a command as those of a process.

    Raises:
        UserError: a command failed, with its exit status; what it said stands above.
    """
    for number, trial in enumerate(trials, 1):
        print(f"\n== {number} of {len(trials)}: {trial.row.label}, seed {trial.seed}", flush=True)
        if trial.result is not None:
            print(f"already done: {trial.result:.2f} %")
            continue
        for command in trial.commands:
            status = subprocess.run(launched(command)).returncode
            if status:
                error = UserError(f"{command[0]} of {trial.row.label} ended with {status}; run this again to go on")
                error.exit_status = status if status > 0 else 128 - status  # as a shell reports a signal
                raise error


def on_this_machine(command: list[str], num_ranks: int) -> list[str]:
    """The words of one command as a process, by torchrun where there are several ranks."""
    if num_ranks == 1:
        return [sys.executable, "-m", "moco_dist", *command]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *torchrun, "-m", "moco_dist", *command]


def as_markdown(trials: list[Trial], scale: str) -> str:
    """The table: published, ours (mean ± standard deviation over seeds), their difference, and the runs."""
    lines = [
        "| row | published, % | ours, % | difference | MLflow |", "| --- | --- | --- | --- | --- |"
    ]  # fmt: skip
    for row in dict.fromkeys(trial.row for trial in trials):
        done = [(trial, trial.result) for trial in trials if trial.row == row and trial.result is not None]
        results = [result for _, result in done]
        ours = f"{statistics.mean(results):.2f}" if results else MISSING
        if len(results) > 1:
            ours += f" ± {statistics.stdev(results):.2f} ({len(results)} seeds)"
        difference = f"{statistics.mean(results) - row.published:+.2f}" if results and scale == "full" else MISSING
        pages = [(trial, page_of(trial.run_dir)) for trial, _ in done]
        links = [f"[seed {trial.seed}]({page})" if page else str(trial.run_dir) for trial, page in pages]
        lines.append(f"| {row.label} | {row.published} | {ours} | {difference} | {', '.join(links) or MISSING} |")
    if scale == "small":
        lines += [
            "",
            "Published: ResNet-50 on ImageNet. Ours: a small network on small pictures: the order can be "
            "compared, the numbers cannot.",
        ]
    return "\n".join(lines) + "\n"
