"""A run's step as one rank of a large world, on this machine: the program itself on tensors without memory or values.

The real `build_method`, key exchange, colours, copies, `train_step` and log run, on a GPU that `fake_gpu` pretends.
Nothing is timed. What `engine.compile` compiles is traced beside it (`compiled`). Not run are the loader's decoding,
what the compiler makes of a graph, CUDA graphs and DeepSpeed: the step is counted as it is without them, and
`DryRun.not_traced` says so.
"""

import contextlib
import io
import tempfile
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import transfer, views
from moco_dist.data.batch import CropBatch
from moco_dist.data.colours import COLOUR_COLUMNS, apply_colours
from moco_dist.data.images import ImageFolder
from moco_dist.data.names import Names
from moco_dist.data.plan import Plan, plan_of
from moco_dist.data.tasks import view_task
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.method.build import build_method
from moco_dist.method.step import Method
from moco_dist.planning.compiled import Traced, lines, traced
from moco_dist.planning.fake_gpu import DEVICE, fake_rank, replaced
from moco_dist.planning.table import megabytes
from moco_dist.planning.watch import Count, HostWaitError, Memory, Watch, line_of_program
from moco_dist.run.logbook import Logbook

STEPS = 2  # a log step, in which what is made once is made, and a plain one


@dataclass(frozen=True)
class DryRun:
    """What one rank's step asks of its GPU.

    Attributes:
        memory: bytes by part at the moment of a step when most is allocated; without what CUDA and
            its libraries take for themselves.
        step: what a step asks for, from the crops on the host to the queue.
        log_step: the same of a step that is logged.
        compiled: what torch.compile takes of the step, where the config asks for it.
        not_traced: a line for each thing that the config asks for and that this cannot run.
    """

    memory: dict[str, int]
    step: Count
    log_step: Count
    compiled: dict[str, Traced]
    not_traced: list[str]


def dry_run(config: PretrainConfig, num_nodes: int, gpus_per_node: int, rank: int = 0) -> DryRun:
    """Run a log step and a plain step as `rank` of num_nodes x gpus_per_node.

    Raises:
        UserError: the config cannot work so; one line that says where and why.
    """
    asked, config = config, _traceable(config)
    world = World(rank, rank % gpus_per_node, num_nodes * gpus_per_node, gpus_per_node, str(DEVICE))
    compiled: dict[str, Traced] = {}
    try:
        with fake_rank(world), Watch() as watch, tempfile.TemporaryDirectory() as folder:
            memory, step, log_step = _steps(config, world, watch, Path(folder))
        if asked.engine.compile != "off":
            compiled = traced(asked, config.optim.global_batch_size // world.world_size)
        return DryRun(memory, step, log_step, compiled, _not_traced(asked))
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not isinstance(error, HostWaitError):  # which says where
            reason = f"{line_of_program(error.__traceback__)}: {reason}"
        raise UserError(f"a step of this config fails as rank {rank} of {world.world_size}: {reason}") from error


def _traceable(config: PretrainConfig) -> PretrainConfig:
    values = config.model_dump(mode="json")
    values["engine"] |= {"kind": "ddp", "zero_stage": 0, "compile": "off", "cuda_graphs": False}
    values["run"]["device"] = "cuda"
    return PretrainConfig.model_validate(values)


def _not_traced(config: PretrainConfig) -> list[str]:
    engine = config.engine
    found = []
    if engine.kind == "deepspeed":
        found.append("engine.kind deepspeed, which asks the driver for its GPU and finds parameters by their "
                     "addresses: the step above is that of ddp; the plan without --dry-run counts DeepSpeed's memory "
                     "and bytes")  # fmt: skip
    if engine.compile != "off":
        graphs = ", nor recorded as CUDA graphs" if engine.cuda_graphs else ""
        found.append(f"the kernels of engine.compile: its graphs are traced, and not made into kernels{graphs}; the "
                     "step above is the eager one")  # fmt: skip
    return found


def _steps(config: PretrainConfig, world: World, watch: Watch, folder: Path) -> tuple[dict[str, int], Count, Count]:
    """Memory by part at the peak, and what a plain step and a logged one ask for."""
    memory = watch.memory
    plan = plan_of(config, (STEPS + 2) * config.optim.global_batch_size)
    method = build_method(config, world)
    side = config.data.image_size
    first = torch.zeros(1, 3, side, side, dtype=torch.uint8).to(DEVICE), torch.zeros(1, len(COLOUR_COLUMNS)).to(DEVICE)
    apply_colours(*first, config.augment, method.dtype)  # makes what is made once, for which the first step waits
    del first
    parts = _parts(method, memory)
    method.engine.optimizer.register_step_pre_hook(
        lambda *_: parts["gradients"].update(memory.lives_of([p.grad for p in method.query_encoder.parameters()]))
    )
    logged = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
    counts = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(replaced(views, "pretrain_batches", lambda *_: _crops(config, plan, world)))
        stack.enter_context(replaced(transfer, "ahead", _ahead(memory, parts["crops (uint8)"])))
        logbook = stack.enter_context(contextlib.closing(Logbook(logged, world, 0, STEPS)))
        images = ImageFolder(folder, Names.of([]), np.empty(0, dtype=np.int64), ())
        feed = views.views_of_steps(images, config, plan, world, 0, STEPS + 2, method.dtype)
        stack.enter_context(contextlib.closing(feed))
        for is_logged in (True, False):
            memory.forget_peak()
            with watch.counting(may_wait=False) as count:
                made, wait_seconds = next(feed)
                parts["views"].update(memory.lives_of([made.query, made.key]))
                result = method.train_step(made, 0.1, is_logged)
                logbook.add(result.loss, wait_seconds)
                del made
            if is_logged:
                with watch.counting(may_wait=True) as reading:
                    logbook.first_not_finite()
                    logbook.write(method.step, 0.0, 0.1, result.scalars)
                count.host_reads += reading.host_reads
            counts.append(count)
    log_step, step = counts
    return memory.at_peak(parts, rest="activations, temporary tensors"), step, log_step


def _parts(method: Method, memory: Memory) -> dict[str, set[int]]:
    """What a method keeps, and empty sets for what a step makes."""
    others = [encoder for encoder in method.encoders.values() if encoder is not method.query_encoder]
    kept = {
        "query encoder's weights": list(method.query_encoder.parameters()),
        "key encoder's weights": [p for encoder in others for p in encoder.parameters()],
        "BatchNorm's statistics": [b for encoder in method.encoders.values() for b in encoder.buffers()],
        "optimiser's momentum": [x for state in method.engine.optimizer.state.values() for x in state.values()],
        "queue shard": [] if method.queue is None else [method.queue.keys],
        "gradients": [],
        "crops (uint8)": [],
        "views": [],
    }
    return {name: memory.lives_of(tensors) for name, tensors in kept.items()}


def _crops(config: PretrainConfig, plan: Plan, world: World) -> Generator[CropBatch, None, None]:
    """What a loader gives, but for the pixels."""
    for step in range(STEPS + 2):
        task = view_task(step, config, plan, world)
        side = config.data.image_size
        crops = torch.empty(task.num_rows, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as of all loaders
        yield task.finish(crops, ()).pin_memory()


def _ahead(memory: Memory, crops: set[int]) -> Callable[..., Generator[Any, None, None]]:
    """`ahead` without its thread, which would not see the fake GPU; as many batches wait on the GPU."""

    def ahead(items: Generator[Any, None, None], depth: int, *_: Any) -> Generator[Any, None, None]:
        made: deque[Any] = deque()
        for batch, arrived in items:
            crops.update(memory.lives_of([batch.view_q, batch.view_k]))
            made.append((batch, arrived))
            del batch
            if len(made) > depth + 1:
                yield made.popleft()
        yield from made

    return ahead


def text(found: DryRun) -> str:
    """The numbers, for a person."""
    rows = [("memory a GPU, at the peak", megabytes(sum(found.memory.values())))]
    rows += [(f"  {name}", megabytes(count)) for name, count in found.memory.items() if count]
    step = found.step
    rows += [
        ("operations a step", f"{sum(step.operations.values()):,}"),
        ("kernels a step, at the least", f"{step.kernels:,}"),
        ("FLOPs a step", f"{step.flops / 1e12:,.2f} T"),
        ("received a GPU and step", megabytes(sum(step.received_bytes.values()))),
        *[(f"  {name}", megabytes(count)) for name, count in step.received_bytes.items()],
        ("host waits for the GPU, a step", f"{len(step.host_reads)} times"),
        ("  and a step that is logged", f"{len(found.log_step.host_reads)} times"),
        *[("", place) for place in found.log_step.host_reads],
        *lines(found.compiled),
        *[("not traced", line) for line in found.not_traced],
    ]
    return "\n".join(f"{name:<32} {value}" for name, value in rows)
