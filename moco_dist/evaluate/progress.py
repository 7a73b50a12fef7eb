"""A training of an evaluation, kept on disk while it goes on: weights, BatchNorm's statistics, momentum, curve.

The training goes on at the very step at which it was stopped. The disk has to be one that all ranks see.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from moco_dist.config.source import what_is_computed
from moco_dist.distributed.collectives import all_reduce_sum
from moco_dist.distributed.stop import STOP, StopRequest
from moco_dist.distributed.world import World
from moco_dist.errors import Preempted
from moco_dist.evaluate.subject import Evaluation, FrozenEncoder, digest
from moco_dist.files import key_of, parsed_json, write_whole
from moco_dist.run.folder import RunFolder

SAVE_SECONDS = 300.0  # what a power cut may cost
Curve = list[dict[str, float]]


def progress_path(evaluation: Evaluation, kind: str, encoder: FrozenEncoder, batch_size: int) -> Path:
    """A file whose name holds a hash of all that the training depends on.

    Args:
        evaluation: settings and images.
        kind: linear or finetune.
        encoder: what is trained, or gives the features, as it is before the training.
        batch_size: over all ranks.
    """
    facts = [
        digest(encoder.module), str(encoder.dtype), evaluation.resize, evaluation.crop, batch_size,
        str(evaluation.train.root.resolve()), evaluation.train.list_hash,
        what_is_computed(evaluation.config),
    ]  # fmt: skip
    return RunFolder(evaluation.config.run_dir).progress(kind, encoder.name, key_of(facts))


class Training:
    """A training with labels: how far it is, and its place on disk. All methods are called by all ranks alike.

    Attributes:
        curve: what was measured so far; the caller's to append to.
        step: optimiser steps done.
    """

    def __init__(
        self,
        path: Path | None,
        module: nn.Module,
        sgd: torch.optim.SGD,
        stop: StopRequest | None,
        world: World,
        settle: Callable[[], None] | None = None,
    ) -> None:
        """Go on from `path`, if there is a whole file.

        Args:
            path: file; None keeps nothing.
            module: what is trained; filled in.
            sgd: its optimiser; filled in.
            stop: who may ask for an end; None: nobody.
            world: this process.
            settle: makes `module` equal on all ranks, before rank 0 writes its own.
        """
        self._path, self._module, self._sgd, self._stop, self._world = path, module, sgd, stop, world
        self._settle = settle
        self._losses: list[float] = []  # since the last `mean_loss`, means over ranks
        self._on_device: list[Tensor] = []  # likewise, but this rank's, and not yet taken to the host
        kept = load_progress(path, module, sgd) if path else {}
        self.curve: Curve = kept.get("curve", [])
        self.step: int = kept.get("step", 0)
        self._losses += kept.get("losses", [])

    def add(self, loss: Tensor) -> None:
        """A step was done, with this rank's loss. Saves where it is time to.

        Raises:
            Preempted: somebody asked; it is saved.
        """
        self.step += 1
        self._on_device.append(loss.detach())
        asked = self._stop.agreed(self.step) if self._stop else None
        if asked:
            self.save()
        if asked == STOP:
            raise Preempted(self.step)

    def mean_loss(self) -> float:
        """The mean of the losses since it was last asked for, over all ranks."""
        losses = self._pending_losses()
        mean = math.fsum(losses) / len(losses)
        self._losses.clear()
        return mean

    def save(self) -> None:
        """Write the file."""
        if self._settle is not None:
            self._settle()
        losses = self._pending_losses()
        if self._path and self._world.is_main:
            facts = {"curve": self.curve, "step": self.step, "losses": losses}
            save_progress(self._path, self._module, self._sgd, facts)

    def _pending_losses(self) -> list[float]:
        if self._on_device:
            own = torch.stack(self._on_device)
            self._losses += (all_reduce_sum(own, self._world) / self._world.world_size).tolist()
            self._on_device.clear()
        return list(self._losses)


def save_progress(path: Path, module: nn.Module, sgd: torch.optim.SGD, facts: dict[str, Any]) -> None:
    """Write the file; it is complete whenever it is there."""
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        state = {key: value for key, value in sgd.state[parameter].items() if value is not None}
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
    write_whole(path, safetensors.torch.save(tensors, metadata={"progress": json.dumps(facts)}))


def load_progress(path: Path, module: nn.Module, sgd: torch.optim.SGD) -> dict[str, Any]:
    """Fill module and SGD; returns the facts, none if the file is missing, damaged or of an older version."""
    try:
        with safetensors.safe_open(path, "pt", device=str(next(module.parameters()).device)) as file:
            facts = parsed_json((file.metadata() or {}).get("progress", "{}"))
            names = list(file.keys()) if facts and isinstance(facts, dict) else []
            tensors = {name: file.get_tensor(name) for name in names}
    except (FileNotFoundError, ValueError, safetensors.SafetensorError):
        return {}
    wanted = module.state_dict()
    momenta = {name: f"{name}.momentum_buffer" for name, _ in module.named_parameters()}
    shapes = {name: value.shape for name, value in wanted.items()}
    shapes |= {key: wanted[name].shape for name, key in momenta.items() if key in tensors}
    if any(name not in tensors or tensors[name].shape != shape for name, shape in shapes.items()):
        return {}  # nothing is filled in part
    module.load_state_dict({name: tensors[name] for name in wanted})
    for name, parameter in module.named_parameters():
        if momenta[name] in tensors:
            # In the parameter's memory layout, as SGD makes it.
            buffer = torch.empty_like(parameter, requires_grad=False)
            sgd.state[parameter]["momentum_buffer"] = buffer.copy_(tensors[momenta[name]])
    return facts
