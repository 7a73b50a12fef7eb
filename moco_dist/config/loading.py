"""The settings of loading, which training and every evaluation share."""

import os
from pathlib import Path
from typing import Literal

from moco_dist.config.section import PositiveInt, Section, setting

Loader = Literal["torchvision", "dali", "ffcv"]
OnError = Literal["fail", "skip-and-report"]


def is_pattern(path: Path) -> bool:
    """Whether a path stands for several, as `set-train-{0000..1023}.tar` does, and is no file of that very name."""
    return "{" in str(path) and not path.exists()


def without_pattern(path: Path) -> Path:
    """The folder that all files of a pattern lie in, or below; another path as it is."""
    return next(part for part in (path, *path.parents) if not is_pattern(part))


class DaliConfig(Section):
    """NVIDIA DALI's pipeline. All of it changes speed and memory only."""

    decode_on: Literal["cpu", "gpu"] = setting(
        "cpu",
        "gpu: DALI's mixed decoder, the hardware's where there is one; crops are then made on the GPU too",
        changes="speed",
        times=("loader",),
    )
    hw_decoder_load: float = setting(
        0.65, "gpu: share of a batch for the hardware decoder", changes="speed", times=("loader",), ge=0, le=1
    )
    device_padding_bytes: int = setting(
        16 * 2**20,
        "gpu: preallocated for each decoding thread on the device",
        changes="speed",
        times=("loader",),
        unit="bytes",
        ge=0,
    )
    host_padding_bytes: int = setting(
        8 * 2**20,
        "gpu: preallocated for each decoding thread in page-locked memory",
        changes="speed",
        times=("loader",),
        unit="bytes",
        ge=0,
    )


MOST_WORKERS = 8
DEFAULT_WORKERS = f"the rank's share of the host's cores but one, 1 to {MOST_WORKERS}"


def worker_count(num_workers: int | None, local_world_size: int | None) -> int:
    """`num_workers`, or by default a rank's share of the cores of this process, less one for the rank itself; 1 to 8.

    `local_world_size`: ranks on this host; None: on another host, which is taken to have cores enough.
    """
    if num_workers is not None:
        return num_workers
    if local_world_size is None:
        return MOST_WORKERS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // local_world_size - 1))


class LoadingConfig(Section):
    """Who decodes and crops, and how far ahead."""

    num_workers: int | None = setting(
        None,
        "loader processes per rank (0 loads in the training process), dali: threads; default: " + DEFAULT_WORKERS,
        changes="speed",
        per_host=True,
        ge=0,
        le=256,
    )
    prefetch_batches: PositiveInt = setting(
        2, "batches ready ahead of the step: of each worker; dali: of the rank", changes="speed"
    )
    cache_dir: Path | None = setting(
        None,
        "folder on a disk of the host, in which what is read from an address is kept for the next epoch, by all its "
        "ranks and runs; default: nothing is kept, in evaluations the run's",
        changes="speed",
        per_host=True,
    )
    cache_bytes: int | None = setting(
        None,
        "the most that may lie in data.cache_dir; default: nine tenths of what is free",
        changes="speed",
        per_host=True,
        unit="bytes",
        gt=0,
    )
    dali: DaliConfig = DaliConfig()
