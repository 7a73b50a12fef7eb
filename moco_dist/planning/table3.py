"""Memory and time of MoCo beside the end-to-end method, Table 3 of MoCo v2 (arXiv 2003.04297), on this machine.

The paper's rows are of 8 GPUs; what is measured is one rank with its share of the batch: the real `train_step` on
random crops, with colours, without loading and without the network. Every measurement is a process of its own, so that
no other's memory counts, and the methods take turns. A measurement is kept as soon as it is there: whoever stops and
starts again goes on with the next.
"""

import json
import multiprocessing
import signal
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import torch

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World, world_from_env
from moco_dist.errors import Preempted
from moco_dist.files import key_of, parsed_json, write_whole
from moco_dist.planning.arithmetic import sizes
from moco_dist.planning.random_step import RandomStep
from moco_dist.provenance import hardware, package_versions, source_hash

RANKS = 8  # of the paper
CONFIGS = {"MoCo": "mocov2_r50_200ep", "end to end": "end_to_end_r50_b256"}
# Method and global batch: GB a GPU, hours of 200 epochs on 8 V100. 93 GB is the paper's own estimate.
PUBLISHED = {("MoCo", 256): ("5.0", "53"), ("end to end", 256): ("7.4", "65"), ("end to end", 4096): ("93 (est.)", "–")}
LOCAL_BATCHES = (32, 128, 512)  # samples of a rank
STEPS, ROUNDS = 5, 2
Reading = tuple[int, float] | None  # peak bytes and seconds of a step; None: it did not fit


def configs_of(folder: Path, overlays: Sequence[Path] = (), flags: Sequence[str] = ()) -> dict[str, PretrainConfig]:
    """The method's configs, with the same overlays and flags."""
    return {
        method: read_config(PretrainConfig, folder / f"{name}.yaml", list(flags), overlays)
        for method, name in CONFIGS.items()
    }


def table(folder: Path, is_small: bool, kept: Path) -> str:
    """The table, measured here and now, or kept in a file by a call that was stopped.

    Args:
        folder: the configs.
        is_small: whether reproduce_small.yaml goes over them.
        kept: see `measure`.

    Raises:
        Preempted: see `measure`.
    """
    device = world_from_env("auto").device
    overlays = [folder / "reproduce_small.yaml"] if is_small else []
    configs = configs_of(folder, overlays, ["--run.device", device.split(":")[0]])
    model, side = configs["MoCo"].model.arch, configs["MoCo"].data.image_size
    rows = measure(configs, LOCAL_BATCHES, device, STEPS, ROUNDS, kept)
    return f"{as_markdown(rows)}\nOurs: {model}, {side} px, on {hardware(device)}. Published: 8 V100, fp32.\n"


def measure(
    configs: dict[str, PretrainConfig],
    local_batches: Sequence[int],
    device: str,
    steps: int,
    rounds: int,
    kept: Path | None = None,
) -> list[dict[str, Any]]:
    """A row for each method and batch: peak bytes and seconds of a step, None where it did not fit.

    On a GPU the bytes are those that torch had allocated at most; on a CPU the process's peak beyond what its imports
    hold.

    Args:
        configs: of each method.
        local_batches: samples of a rank.
        device: where.
        steps: of a measurement.
        rounds: measurements of each.
        kept: a file for what is measured; what the same measurements have left there is not measured again.

    Raises:
        Preempted: Ctrl-C or SIGTERM, and `kept` has what was measured.
    """
    cases = [(method, batch) for batch in local_batches for method in configs]
    turns = [case for _ in range(rounds) for case in cases]
    key = _key(configs, cases, device, steps) if kept else ""
    found = _read(kept, key)[: len(turns)] if kept else []
    with Told("table3", len(turns), "measurements", World(), len(found)) as told:
        for method, batch in turns[len(found) :]:
            try:
                fits = None not in _of((method, batch), turns, found)
                found.append(_alone(configs[method], batch, steps, device) if fits else None)
            except KeyboardInterrupt:
                if kept is None:
                    raise
                raise Preempted(f"{len(found)} of {len(turns)} measurements are kept") from None
            if kept:
                write_whole(kept, json.dumps({"key": key, "found": found}).encode())
            told.add(note=f"{method}, {batch} samples")
    rows = []
    for method, batch in cases:
        readings = _of((method, batch), turns, found)
        fitting = [reading for reading in readings if reading is not None]
        fits = len(fitting) == len(readings)
        rows.append({
            "method": method, "local_batch": batch,
            "peak_bytes": max(peak for peak, _ in fitting) if fits else None,
            "step_seconds": statistics.median(seconds for _, seconds in fitting) if fits else None,
        })  # fmt: skip
    return rows


def _of(case: tuple[str, int], turns: list[tuple[str, int]], found: list[Reading]) -> list[Reading]:
    """The readings of a case so far."""
    return [reading for turn, reading in zip(turns, found, strict=False) if turn == case]


def _key(configs: dict[str, PretrainConfig], cases: list[tuple[str, int]], device: str, steps: int) -> str:
    """A hash of what the measurements depend on."""
    settings = {method: config.model_dump(mode="json") for method, config in configs.items()}
    return key_of([settings, cases, hardware(device), steps, package_versions(), source_hash()])


def _read(kept: Path, key: str) -> list[Reading]:
    """What the same measurements have left; nothing where that is missing or damaged."""
    try:
        content = parsed_json(kept.read_bytes())
        return [tuple(reading) if reading else None for reading in content["found"]] if content["key"] == key else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _alone(config: PretrainConfig, local_batch: int, steps: int, device: str) -> Reading:
    """Peak bytes and seconds of a step, in a process of its own; None where memory is too small.

    On a CPU it is not tried where the activations alone exceed free memory: the kernel might end another process.
    """
    if device == "cpu":
        values, group = config.model_dump(mode="json"), config.model.bn_group_size
        values["optim"]["global_batch_size"] = group
        of_a_group = sizes(PretrainConfig.model_validate(values), 1, 1).activation_bytes
        if of_a_group * local_batch / group > psutil.virtual_memory().available:
            return None
    is_deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is this process's
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **is_deaf) as pool:
        try:
            return pool.submit(_measured, config, local_batch, steps, device, torch.get_num_threads()).result()
        except (torch.OutOfMemoryError, BrokenProcessPool):  # a GPU's; a host's, where the kernel ends the process
            return None
        except KeyboardInterrupt:  # the pool waits for its process
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _measured(config: PretrainConfig, local_batch: int, steps: int, device: str, threads: int) -> tuple[int, float]:
    torch.set_num_threads(threads)
    before = psutil.Process().memory_info().rss
    seconds = RandomStep(config, local_batch, device).seconds(steps)
    if device != "cpu":
        return torch.cuda.max_memory_allocated(), seconds
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 - before, seconds


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table: ours, its ratio to MoCo's at the same batch, and the published."""
    columns = ["method", "batch of a rank", f"of {RANKS} ranks", "GB", "of MoCo's", "s a step", "of MoCo's",
               "published: GB", "hours"]  # fmt: skip
    lines = [columns, ["---"] * len(columns)]
    moco = {row["local_batch"]: row for row in rows if row["method"] == "MoCo"}
    for row in rows:
        base, whole = moco[row["local_batch"]], RANKS * row["local_batch"]
        cells = [row["method"], str(row["local_batch"]), f"{whole:,}"]
        for key, unit, form in (("peak_bytes", 1e-9, ".2f"), ("step_seconds", 1, ".3f")):
            value = row[key]
            cells.append("does not fit" if value is None else format(unit * value, form))
            cells.append("–" if None in (value, base[key]) else f"{value / base[key]:.2f}")
        lines.append([*cells, *PUBLISHED.get((row["method"], whole), ("–", "–"))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
