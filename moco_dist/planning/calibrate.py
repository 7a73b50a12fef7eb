"""A minute on this machine: the real step on random crops, the real loader, the real all-reduce, each timed."""

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import plan_of
from moco_dist.data.sources import find_training_images
from moco_dist.distributed import collectives
from moco_dist.distributed.collectives import all_reduce_sum, barrier
from moco_dist.distributed.world import World, world_from_env
from moco_dist.errors import UserError
from moco_dist.planning import measurements
from moco_dist.planning.measurements import Measurement, settings_of
from moco_dist.planning.random_step import WARM_UP_STEPS, RandomStep, synchronise
from moco_dist.provenance import hardware, package_versions

MAX_STEPS, LOADER_STEPS = 50, 8
STEP_SECONDS, LOADER_SECONDS = 30.0, 15.0
REDUCE_CALLS, LATENCY_CALLS = 5, 20


def calibrate_here(
    config: PretrainConfig, planned_world_size: int, gpu: str | None, folder: Path
) -> Measurement | None:
    """`calibrate` on the ranks of this command, and write it into `folder`; None on all ranks but the first.

    Raises:
        UserError: this machine has no `gpu`.
    """
    world = world_from_env(config.run.device)
    here = hardware(world.device)
    if gpu and gpu.lower() not in here.lower():
        raise UserError(f"this machine has {here}, not {gpu}; run --calibrate on one that has it")
    with collectives.process_group(world):
        measured = calibrate(config, planned_world_size, world)
    if not world.is_main:
        return None
    path = measurements.write(measured, package_versions(), "moco-dist plan --calibrate", folder)
    return dataclasses.replace(measured, path=str(path))


def calibrate(config: PretrainConfig, planned_world_size: int, world: World) -> Measurement:
    """Measure on this rank; the other ranks of `world` do the same at the same time. Called by all ranks.

    Args:
        config: of the planned run.
        planned_world_size: its ranks: a rank's share of the batch is what is measured.
        world: the ranks of this calibration.
    """
    if config.engine.kind == "deepspeed":
        raise UserError("--calibrate times engine.kind ddp; a plan for deepspeed has no measured step")
    local_batch = config.optim.global_batch_size // planned_world_size
    step = RandomStep(config, local_batch, world.device)
    barrier(world)
    parts = _parts(step)
    peak = torch.cuda.max_memory_allocated() if world.device != "cpu" else 0
    parameters = sum(p.numel() for p in step.method.query_encoder.parameters())
    gradients = torch.zeros(parameters, device=world.device)
    reduce_seconds = latency = 0.0
    if world.world_size > 1:
        reduce_seconds = timed(lambda: all_reduce_sum(gradients, world), REDUCE_CALLS, world)
        latency = timed(lambda: all_reduce_sum(gradients[:1], world), LATENCY_CALLS, world)
    return Measurement(
        hardware=hardware(world.device), date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        settings=settings_of(config), local_batch=local_batch, world_size=world.world_size, num_nodes=world.num_nodes,
        parts=parts, peak_bytes=peak, loader_core_seconds=loader_core_seconds(config, planned_world_size),
        loader_world_size=planned_world_size, all_reduce_bytes=gradients.nbytes, all_reduce_seconds=reduce_seconds,
        latency_seconds=latency,
    )  # fmt: skip


def _parts(step: RandomStep) -> dict[str, float]:
    """Median seconds of a whole step, and of its parts: the device is waited for only when parts are timed."""
    wholes: list[float] = []
    parts: dict[str, list[float]] = {}
    deadline = time.perf_counter() + STEP_SECONDS
    for number in range(WARM_UP_STEPS + MAX_STEPS):
        whole = step.seconds_of_one()
        of_parts = step.seconds_of_parts(step.marks(), "keys, loss, queue")
        if number >= WARM_UP_STEPS:
            wholes.append(whole)
            for name, seconds in of_parts.items():
                parts.setdefault(name, []).append(seconds)
            if time.perf_counter() > deadline:
                break
    return {"step": statistics.median(wholes), **{name: statistics.median(p) for name, p in parts.items()}}


def loader_core_seconds(config: PretrainConfig, world_size: int) -> float | None:
    """CPU seconds of this process for one rank's batch of the planned run; None where its images are not here."""
    try:
        folder = find_training_images(config.data)
        plan = plan_of(config, len(folder.paths))
    except UserError:
        return None
    values = config.model_dump(mode="json")
    values["data"]["prefetch_batches"] = 1
    values["data"]["num_workers"] = 1 if config.data.loader == "dali" else 0
    world = World(rank=0, world_size=world_size, local_world_size=world_size)
    alone = PretrainConfig.model_validate(values)
    with closing(pretrain_batches(folder, alone, plan, world, 0, LOADER_STEPS + 1)) as loader:
        next(loader)  # imports, caches
        before, deadline = time.process_time(), time.perf_counter() + LOADER_SECONDS
        count = 0
        for _ in loader:
            count += 1
            if time.perf_counter() > deadline:
                break
        return (time.process_time() - before) / count


def timed(function: Callable[[], Any], calls: int, world: World) -> float:
    """Median seconds of a collective over a fixed number of calls: all ranks must make the same."""
    function()
    readings = []
    for _ in range(calls):
        barrier(world)
        started = time.perf_counter()
        function()
        synchronise(world.device)
        readings.append(time.perf_counter() - started)
    return statistics.median(readings)
