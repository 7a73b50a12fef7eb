"""What a method keeps, on disk, in files that `tensors.py` writes.

A checkpoint is a folder RUN/checkpoints/step_00001000 with a safetensors file a rank and a checkpoint.json that is
written last, so a folder that has it is complete: `manifest.py` has what it says, and `resume.py` what a resume
refuses. Each rank writes its share of the weights. The queue is one sharded tensor: it loads on any number of ranks.
BatchNorm's running statistics are saved as a row a rank, and their mean: the same number of ranks gets its rows back
bit by bit, another number gets the mean, which is what they stand for.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from moco_dist.distributed.collectives import all_gather, as_sharded, barrier, gather_texts, mean_on_rank_0
from moco_dist.distributed.once import from_rank_0
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.files import write_whole
from moco_dist.method.batch_norm import running_statistics
from moco_dist.method.step import Method
from moco_dist.run import tensors as files_of_tensors
from moco_dist.run.folder import RunFolder
from moco_dist.run.manifest import MANIFEST, manifest_of, read_manifest
from moco_dist.run.tensors import Stored, sha256, shares

CANNOT_WRITE = (Exception, CheckpointException)  # the latter is no Exception
OPTIMIZER = "optimizer."
ROWS, MEAN = "running_statistics", "mean_statistics"  # after the encoder's name


@dataclass(frozen=True)
class Snapshot:
    """This rank's share of a method as it was at `step`, in host memory: nothing of it changes while it is written.

    Attributes:
        step: optimiser steps.
        tensors: of those that all ranks hold, this rank's share; rows of the queue and of running statistics.
        statistics: by encoder, this rank's running statistics, of which the mean is still to be taken.
        manifest: for checkpoint.json.
    """

    step: int
    tensors: dict[str, Tensor]
    statistics: dict[str, Tensor]
    manifest: dict[str, Any]


def snapshot(method: Method, facts: dict[str, Any], world: World) -> Snapshot:
    """Copy this rank's share of the method to host memory: a training waits for nothing else. Called by all ranks.

    Args:
        method: what to save.
        facts: as for `manifest_of`.
        world: this process.
    """
    # safetensors has no strides: channels-last weights are written in their logical order.
    replicated = replicated_tensors(method)
    owners = shares(replicated, world.world_size)
    copies = {name: _to_host(tensor) for name, tensor in replicated.items() if owners[name] == world.rank}
    if method.queue is not None:
        copies["queue"] = as_sharded(_to_host(method.queue.keys), method.queue.size, world)
    encoders = _with_statistics(method)
    rows = {name: _to_host(_as_row(running_statistics(encoder))) for name, encoder in encoders.items()}
    copies |= {f"{name}.{ROWS}": as_sharded(row, world.world_size, world) for name, row in rows.items()}
    return Snapshot(method.step, copies, rows, manifest_of(method, facts, world))


def replicated_tensors(method: Method) -> dict[str, Tensor]:
    """Every tensor that all ranks hold equally, by name. Called by all ranks.

    Weights and queue_ptr are the live ones, so that loading fills them in place.
    """
    tensors = {
        f"{name}.{key}": value.detach()
        for name, encoder in method.encoders.items()
        for key, value in encoder.named_parameters()
    }
    tensors |= {f"{OPTIMIZER}{name}": value for name, value in method.engine.optimizer_tensors().items()}
    if method.queue is not None:
        tensors["queue_ptr"] = method.queue.ptr
    return tensors


def write(taken: Snapshot, run_dir: Path, world: World, group: dist.ProcessGroup | None = None) -> Path:
    """Write RUN/checkpoints/step_N. Called by all ranks.

    Everything goes to a hidden folder, checkpoint.json last, with the size and SHA-256 of every file; then the folder
    is renamed. A crash at any moment leaves the older checkpoints as they are, and none that looks complete.

    Args:
        taken: what to write.
        run_dir: RUN.
        world: this process.
        group: CPU process group to coordinate by; default: the default one.

    Returns:
        the checkpoint's folder.

    Raises:
        one of CANNOT_WRITE: it cannot be written; nothing of it is left.
    """
    folder = RunFolder(run_dir).checkpoint(taken.step)
    partial = folder.with_name(f".{folder.name}.partial")
    if world.is_main:
        for left_over in partial.parent.glob(".step_*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
    try:
        barrier(world, group)
        means = {f"{name}.{MEAN}": mean_on_rank_0(row, world, group) for name, row in taken.statistics.items()}
        # The writer makes the folder too, and where one rank cannot, all raise.
        files = files_of_tensors.write(taken.tensors | (means if world.is_main else {}), partial, world, group)
        if world.is_main:
            with (partial / MANIFEST).open("w") as file:
                file.write(json.dumps({**taken.manifest, "files": files}, indent=1))
                file.flush()
                os.fsync(file.fileno())  # as torch does with the others: older ones are removed next
            shutil.rmtree(folder, ignore_errors=True)  # the same step again, after a rewind
            partial.rename(folder)
    except CANNOT_WRITE:
        if world.local_rank == 0:  # or a disk that is full of it has no room for anything else
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def prune(run_dir: Path, keep_last: int, keep_every_steps: int) -> None:
    """Remove complete checkpoints but the newest `keep_last` and those at multiples of `keep_every_steps` (0: none)."""
    for old in complete_checkpoints(run_dir)[:-keep_last]:
        if not keep_every_steps or int(old.name.removeprefix("step_")) % keep_every_steps:
            shutil.rmtree(old, ignore_errors=True)


def damage(folder: Path, world: World) -> str:
    """What is wrong with a checkpoint's files: a line, or "" if each has its size and content. Called by all ranks.

    Ranks share the reading: rank r reads files r, r + W, ...
    """
    try:
        files = from_rank_0(lambda: read_manifest(folder)["files"], world)
    except UserError as error:
        return str(error)
    found = []
    for name, expected in sorted(files.items())[world.rank :: world.world_size]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif sha256(path) != expected["sha256"]:
            found.append(f"{path} has another content than was written")
    return next((text for text in gather_texts(next(iter(found), ""), world) if text), "")


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, for people to look at: it takes no intact one's place, and is not evaluated."""
    shutil.rmtree(aside(folder), ignore_errors=True)
    folder.rename(aside(folder))


def aside(folder: Path) -> Path:
    """Where `set_aside` puts a checkpoint."""
    return folder.with_name(f"damaged_{folder.name}")


def load(method: Method, folder: Path, world: World) -> None:
    """Fill `method` from a checkpoint of any world size.

    Raises:
        UserError: the checkpoint is incomplete, damaged, or of another model or queue.
    """
    manifest, stored = from_rank_0(lambda: read_manifest(folder), world), Stored(folder, world)
    tensors = replicated_tensors(method)
    if method.queue is not None:
        if manifest["queue_size"] != method.queue.size:
            raise UserError(
                f"{folder} has a queue of {manifest['queue_size']} keys; moco.queue_size is {method.queue.size}"
            )
        tensors["queue"] = as_sharded(method.queue.keys, method.queue.size, world)
    is_same_world = manifest["world_size"] == world.world_size
    rows = {}
    for name, encoder in _with_statistics(method).items():
        row = _as_row(running_statistics(encoder))
        if is_same_world:
            rows[name] = torch.empty_like(row)
            tensors[f"{name}.{ROWS}"] = as_sharded(rows[name], world.world_size, world)
        else:
            rows[name] = tensors.setdefault(*_mean_to_read(name, row, stored, manifest["world_size"]))
    stored.fill(tensors)
    method.engine.load_optimizer_tensors(
        {name.removeprefix(OPTIMIZER): value for name, value in tensors.items() if name.startswith(OPTIMIZER)}
    )
    for name, encoder in _with_statistics(method).items():
        _fill_from_row(running_statistics(encoder), rows[name].mean(0))  # of one row, or of all that an older one has
    if manifest["loss_scale"]:
        method.engine.scaler.load_state_dict(manifest["loss_scale"])
    method.step = manifest["step"]


def load_query_encoder(encoder: nn.Module, folder: Path, world: World) -> int:
    """Fill `encoder` with a checkpoint's query encoder, its running statistics averaged. Called by all ranks.

    Returns:
        the optimiser steps behind it.
    """
    manifest, stored = from_rank_0(lambda: read_manifest(folder), world), Stored(folder, world)
    tensors = {f"query_encoder.{name}": p.detach() for name, p in encoder.named_parameters()}
    if not (statistics := running_statistics(encoder)):
        stored.fill(tensors)
        return manifest["step"]
    rows = tensors.setdefault(*_mean_to_read("query_encoder", _as_row(statistics), stored, manifest["world_size"]))
    stored.fill(tensors)
    _fill_from_row(statistics, rows.mean(0))
    return manifest["step"]


def _mean_to_read(name: str, row: Tensor, stored: Stored, num_rows: int) -> tuple[str, Tensor]:
    """The tensor of a checkpoint that has the mean of an encoder's running statistics, and memory for it.

    An older checkpoint has all rows, and not their mean.
    """
    if f"{name}.{MEAN}" in stored:
        return f"{name}.{MEAN}", row.new_empty(row.shape)
    return f"{name}.{ROWS}", row.new_empty(num_rows, row.shape[1])


def reason(error: BaseException) -> str:
    """Why a checkpoint could not be written, in a few words of the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next((e for e, _ in error.failures.values() if isinstance(e, Exception)), error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error) or type(error).__name__).strip().splitlines()[-1]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in RunFolder(run_dir).checkpoints.glob(f"step_*/{MANIFEST}"))


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


def averaged(encoder: nn.Module, world: World) -> dict[str, Tensor]:
    """The encoder's running statistics averaged over ranks: what evaluation uses. One small all-gather."""
    if not (local := running_statistics(encoder)):
        return {}
    mean = all_gather(_as_row(local), world).mean(0)
    pieces = mean.split([buffer.numel() for buffer in local.values()])
    return {name: piece.view_as(local[name]) for name, piece in zip(local, pieces, strict=True)}


def export_backbone(method: Method, path: Path, world: World) -> None:
    """The query encoder's backbone with torchvision's names, as safetensors. Called by all ranks.

    Raises:
        OSError: it cannot be written; an older file is as it was.
    """
    statistics = averaged(method.query_encoder, world)
    if not world.is_main:
        return
    tensors = {**method.query_encoder.state_dict(), **statistics}
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v.cpu().contiguous() for k, v in tensors.items() if k.startswith(prefix)}
    write_whole(path, safetensors.torch.save(backbone, metadata={"step": str(method.step), "format": "pt"}))


def _to_host(tensor: Tensor) -> Tensor:
    """A copy of its own in host memory, in logical order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _with_statistics(method: Method) -> dict[str, nn.Module]:
    """The encoders that have running statistics: those with BatchNorm."""
    return {name: encoder for name, encoder in method.encoders.items() if running_statistics(encoder)}


def _as_row(statistics: dict[str, Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in statistics.values()])[None]


def _fill_from_row(statistics: dict[str, Tensor], row: Tensor) -> None:
    for buffer, piece in zip(statistics.values(), row.split([b.numel() for b in statistics.values()]), strict=True):
        buffer.copy_(piece.view_as(buffer))
