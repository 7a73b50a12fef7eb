"""The TrainState and how it is saved: torch.distributed.checkpoint in safetensors files, no pickle anywhere.

A checkpoint is a folder RUN/checkpoints/step_00001000 with one or more safetensors files a rank and a
checkpoint.json that is written last, so a folder that has it is complete. The queue is one sharded tensor: it
loads on any number of ranks. BatchNorm's running statistics are saved as a row a rank: the same number of ranks
gets its rows back bit by bit, another number gets their mean, which is what they stand for.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from moco_dist.distributed.collectives import all_gather, as_sharded, barrier
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.method.batch_norm import running_statistics
from moco_dist.method.queue import Queue

MANIFEST = "checkpoint.json"
ENCODERS = ("query_encoder", "key_encoder")


@dataclass
class TrainState:
    """All that a run is at a step; everything else is recomputed from the config and `step`."""

    query_encoder: nn.Module
    key_encoder: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    queue: Queue
    step: int

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that all ranks hold equally, by name; the live ones, so that loading fills them in place."""
        tensors = {f"{name}.{key}": value for name in ENCODERS for key, value in self._parameters(name)}
        for name, parameter in self.query_encoder.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["queue_ptr"] = self.queue.ptr
        return tensors

    def _parameters(self, name: str) -> list[tuple[str, Tensor]]:
        return [(key, value.detach()) for key, value in getattr(self, name).named_parameters()]


def save(state: TrainState, run_dir: Path, config: dict[str, Any], world: World, keep_last: int) -> Path:
    """Write RUN/checkpoints/step_N, then remove all but the newest `keep_last`. Called by all ranks.

    Args:
        state: what to save.
        run_dir: RUN.
        config: the resolved config as plain values.
        world: this process.
        keep_last: complete checkpoints to keep.

    Returns:
        the checkpoint's folder.
    """
    folder = run_dir / "checkpoints" / f"step_{state.step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(world)
    # safetensors has no strides: channels-last weights are written in their logical order.
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()}
    tensors["queue"] = as_sharded(state.queue.keys, state.queue.size, world)
    for name in ENCODERS:
        row = _as_row(running_statistics(getattr(state, name)))
        tensors[f"{name}.running_statistics"] = as_sharded(row, world.world_size, world)
    writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _alone_on_purpose():
        dcp.save(tensors, storage_writer=writer, no_dist=world.world_size == 1)
    barrier(world)
    if world.is_main:
        manifest = {
            "step": state.step,
            "world_size": world.world_size,
            "queue_size": state.queue.size,
            "loss_scale": state.scaler.state_dict(),
            "config": config,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        partial.rename(folder)
        for old in complete_checkpoints(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    barrier(world)
    return folder


def load(state: TrainState, folder: Path, world: World) -> None:
    """Fill `state` from a checkpoint of any world size.

    Raises:
        UserError: the checkpoint is incomplete, damaged, or of another model or queue.
    """
    manifest = read_manifest(folder)
    if manifest["queue_size"] != state.queue.size:
        raise UserError(f"{folder} has a queue of {manifest['queue_size']} keys; moco.queue_size is {state.queue.size}")
    tensors = state.tensors()
    tensors["queue"] = as_sharded(state.queue.keys, state.queue.size, world)
    saved_worlds = manifest["world_size"]
    rows = {}
    for name in ENCODERS:
        row = _as_row(running_statistics(getattr(state, name)))
        rows[name] = tensors[f"{name}.running_statistics"] = row.new_empty(saved_worlds, row.shape[1])
    _read(tensors, folder, world)
    for name in ENCODERS:
        row = rows[name][world.rank] if saved_worlds == world.world_size else rows[name].mean(0)
        _fill_from_row(running_statistics(getattr(state, name)), row)
    if manifest["loss_scale"]:
        state.scaler.load_state_dict(manifest["loss_scale"])
    state.step = manifest["step"]


def load_query_encoder(encoder: nn.Module, folder: Path) -> int:
    """Fill `encoder` with a checkpoint's query encoder, its running statistics averaged; returns the step."""
    manifest = read_manifest(folder)
    tensors = {f"query_encoder.{name}": p.detach() for name, p in encoder.named_parameters()}
    row = _as_row(running_statistics(encoder))
    rows = tensors["query_encoder.running_statistics"] = row.new_empty(manifest["world_size"], row.shape[1])
    _read(tensors, folder, World())
    _fill_from_row(running_statistics(encoder), rows.mean(0))
    return manifest["step"]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}"))


def latest(run_dir: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    found = complete_checkpoints(run_dir)
    if not found:
        reason = "has no complete checkpoint" if run_dir.is_dir() else "does not exist"
        first = f"pre-train first: moco-dist pretrain CONFIG --run.dir {run_dir}"
        raise UserError(f"run folder {run_dir} {reason}; {first}")
    return found[-1]


def read_manifest(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a complete checkpoint.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from error
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from error


def averaged(encoder: nn.Module, world: World) -> dict[str, Tensor]:
    """The encoder's running statistics averaged over ranks: what evaluation uses. One small all-gather."""
    local = running_statistics(encoder)
    mean = all_gather(_as_row(local), world).mean(0)
    pieces = mean.split([buffer.numel() for buffer in local.values()])
    return {name: piece.view_as(local[name]) for name, piece in zip(local, pieces, strict=True)}


def export_backbone(state: TrainState, path: Path, world: World) -> None:
    """The query encoder's backbone with torchvision's names, as safetensors. Called by all ranks."""
    statistics = averaged(state.query_encoder, world)
    if not world.is_main:
        return
    tensors = {**state.query_encoder.state_dict(), **statistics}
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v.cpu().contiguous() for k, v in tensors.items() if k.startswith(prefix)}
    safetensors.torch.save_file(backbone, path, metadata={"step": str(state.step), "format": "pt"})


def _read(tensors: dict[str, Tensor], folder: Path, world: World) -> None:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with _alone_on_purpose():
            dcp.load(tensors, storage_reader=reader, no_dist=world.world_size == 1)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder} does not fit this config or is damaged: {reason}") from error


@contextlib.contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Without the warning that there is no process group: a world of one has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _as_row(statistics: dict[str, Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in statistics.values()])[None]


def _fill_from_row(statistics: dict[str, Tensor], row: Tensor) -> None:
    for buffer, piece in zip(statistics.values(), row.split([b.numel() for b in statistics.values()]), strict=True):
        buffer.copy_(piece.view_as(buffer))
