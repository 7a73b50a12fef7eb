"""Settings of what a pre-training leaves: its folder, log, checkpoints and tracking."""

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from moco_dist.config.section import PositiveInt, Section, setting


class RunConfig(Section):
    """Where the run lives and what makes it repeatable."""

    dir: Path = setting(
        ..., "folder of the run: resolved config, log, checkpoints, evaluations", changes="record", per_host=True
    )
    seed: int = setting(
        0, "every random number is a function of (seed, step, sample, view)", changes="result", ge=0, lt=2**31
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto takes CUDA where there is a GPU", changes="place", per_host=True
    )
    stop_at_step: int | None = setting(
        None, "end early, with a checkpoint; schedules stay those of the full run", changes="record", unit="steps", gt=0
    )
    resume: Literal["auto", "changed"] = setting(
        "auto",
        "where the folder has a checkpoint, go on from it; auto refuses settings that change what is computed, "
        "and other images; changed takes what fits the checkpoint's weights",
        changes="record",
        per_host=True,
    )
    peer_timeout_seconds: float = setting(
        60.0, "how long a rank may be silent until the others end and name it", changes="place", unit="seconds", ge=1
    )


class LogConfig(Section):
    """What is written down and when."""

    every_steps: PositiveInt = setting(
        50, "one line of the log, and the only synchronisation of host and device", changes="record", unit="steps"
    )
    knn_every_epochs: int = setting(
        0,
        "accuracy of kNN and of a linear probe on a sample during training; 0 is never",
        changes="record",
        unit="epochs",
        ge=0,
    )
    knn_train_samples: PositiveInt = setting(20_000, "training images of that sample", changes="record", unit="samples")
    knn_val_samples: PositiveInt = setting(5_000, "validation images of that sample", changes="record", unit="samples")
    profile_steps: tuple[PositiveInt, PositiveInt] | None = setting(
        None,
        "first and last step of which torch.profiler keeps a trace, on rank 0; these steps are slower",
        changes="record",
        unit="steps",
    )

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps and steps[0] > steps[1]:
            raise ValueError(f"the first step, {steps[0]}, comes after the last, {steps[1]}")
        return steps


class CheckpointConfig(Section):
    """When what a run keeps is written to disk."""

    every_steps: PositiveInt = setting(
        5_000, "between checkpoints; one more at the end", changes="record", unit="steps"
    )
    every_seconds: float = setting(
        1_800.0, "a checkpoint also whenever the last is older", changes="record", unit="seconds", gt=0
    )
    keep_last: PositiveInt = setting(2, "older checkpoints are removed", changes="record")
    keep_every_epochs: int = setting(
        0, "but those at multiples of this are kept; 0 is none", changes="record", unit="epochs", ge=0
    )


class TrackingConfig(Section):
    """MLflow on rank 0."""

    backend: Literal["mlflow", "none"] = setting("mlflow", "none: only log.jsonl in the run's folder", changes="record")
    uri: str | None = setting(
        None,
        "of the tracking server; default: MLFLOW_TRACKING_URI, else sqlite in the folder above the run's",
        changes="record",
    )
    experiment: str = setting(
        "moco_dist",
        "name of the MLflow experiment; where it is not given, MLFLOW_EXPERIMENT_NAME goes first",
        changes="record",
        min_length=1,
    )
