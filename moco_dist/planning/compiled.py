"""What torch.compile takes of a run's step on a GPU: its own front half, TorchDynamo, on tensors without memory.

Whether a function is one graph, and whether all of the graph lies on the GPU, as a CUDA graph must, is known from this.
Kernels are not made: for that the compiler asks the driver.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.colours import COLOUR_COLUMNS, apply_colours
from moco_dist.engine.optimizer import LARS, build_optimizer
from moco_dist.engine.precision import autocast
from moco_dist.method.encoder import Encoder
from moco_dist.planning.arithmetic import dtype_of
from moco_dist.planning.fake_gpu import DEVICE, fresh_caches, replaced
from moco_dist.planning.watch import PACKAGE


@dataclass
class Traced:
    """The graphs that one function becomes.

    Attributes:
        graphs: how many; 1 where nothing breaks it.
        operations: of all graphs.
        off_gpu: lines of the program whose results lie on the CPU; a CUDA graph cannot hold them.
        breaks: why there is more than one graph.
    """

    graphs: int = 0
    operations: int = 0
    off_gpu: list[str] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        """For torch.compile: counts a graph, and runs it as it is."""
        self.graphs += 1
        for node in graph.graph.nodes:
            self.operations += node.op.startswith("call_")
            made = [x for x in tree_leaves(node.meta.get("example_value")) if isinstance(x, Tensor)]
            if any(x.device.type == "cpu" for x in made) and (where := _line_of(node)) not in self.off_gpu:
                self.off_gpu.append(where)
        return graph


def traced(config: PretrainConfig, local_batch: int) -> dict[str, Traced]:
    """What `engine.compile` of `config` compiles, by name, for a rank of `local_batch` samples a step.

    DDP's cuts at its buckets are not among the graphs.
    """
    dtype, side, accum = dtype_of(config), config.data.image_size, config.optim.grad_accum_steps
    found: dict[str, Traced] = {}
    with torch.device("meta"):
        encoder = Encoder(config.model, side)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with _on_fake_gpu():
        encoder.to_empty(device=DEVICE)
        images = torch.empty(config.of_method.num_directions * local_batch // accum, 3, side, side, device=DEVICE)
        images = images.to(memory_format=torch.channels_last)
        with _tracing(found, "encoder") as backend, autocast(dtype, str(DEVICE)):
            torch.compile(encoder, backend=backend, dynamic=False)(images)
        if config.engine.compile != "step":
            return found
        views = torch.empty(local_batch, 3, side, side, dtype=torch.uint8, device=DEVICE)
        values = torch.empty(local_batch, len(COLOUR_COLUMNS), device=DEVICE)
        apply_colours(views, values, config.augment, dtype)  # makes what is made once
        with _tracing(found, "colours") as backend:
            torch.compile(apply_colours, backend=backend, dynamic=False)(views, values, config.augment, dtype)
        optimizer = build_optimizer(encoder, config.optim)
        if isinstance(optimizer, LARS):
            for parameter in encoder.parameters():
                parameter.grad = torch.empty_like(parameter)
            with _tracing(found, "LARS") as backend:
                optimizer._update = torch.compile(optimizer._update, backend=backend, dynamic=False)  # type: ignore[method-assign]
                optimizer.step()
    return found


@contextlib.contextmanager
def _on_fake_gpu() -> Iterator[None]:
    """What is made lies on a GPU and has no values; unlike in `fake_rank`, there is no backward pass."""
    with (
        warnings.catch_warnings(action="ignore"),
        fresh_caches(),
        replaced(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        replaced(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextlib.contextmanager
def _tracing(found: dict[str, Traced], name: str) -> Iterator[Callable]:
    """The backend for one function, whose breaks are told at the end."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters["graph_break"].clear()
    found[name] = Traced()
    try:
        yield found[name].backend
        found[name].breaks = [reason.strip().splitlines()[0] for reason in counters["graph_break"]]
    finally:
        torch.compiler.reset()


def _line_of(node: torch.fx.Node) -> str:
    """The last line of the program in a node's stack, or else of what uses the program; or the node's name."""
    found = re.findall(r'File "(.+)", line (\d+)', node.meta.get("stack_trace") or "")
    of_program = [place for place in found if PACKAGE in Path(place[0]).parents]
    for file, line in (of_program or [place for place in found if "torch" not in Path(place[0]).parts])[-1:]:
        return f"{file.removeprefix(f'{PACKAGE.parent}/') if of_program else Path(file).name}:{line}"
    return node.name


def lines(found: dict[str, Traced]) -> list[tuple[str, str]]:
    """The same for a person: what, and what becomes of it."""
    rows = []
    for name, of in found.items():
        count = f"{of.graphs} graph{'s' * (of.graphs != 1)} of {of.operations:,} operations"
        rows.append((f"{name}, compiled", count))
        rows += [("", f"broken by: {reason}") for reason in of.breaks]
        rows += [("", f"{line}: lies on the CPU, and so in no CUDA graph") for line in of.off_gpu]
    return rows
