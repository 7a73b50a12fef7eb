"""What a method keeps, on disk: torch.distributed.checkpoint in safetensors files, no pickle anywhere.

A checkpoint is a folder RUN/checkpoints/step_00001000 with one or more safetensors files a rank and a
checkpoint.json that is written last, so a folder that has it is complete. The queue is one sharded tensor: it
loads on any number of ranks. BatchNorm's running statistics are saved as a row a rank: the same number of ranks
gets its rows back bit by bit, another number gets their mean, which is what they stand for.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from moco_dist.config.credentials import without_credentials
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.images import ImageFolder
from moco_dist.distributed.collectives import all_gather, as_sharded, barrier, gather_texts
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError, UserError
from moco_dist.files import write_whole
from moco_dist.method.batch_norm import running_statistics
from moco_dist.method.step import Method
from moco_dist.provenance import git_state, package_versions
from moco_dist.run.folder import RunFolder
from moco_dist.run.image_list import listed
from moco_dist.run.manifest import MANIFEST, read_manifest

CANNOT_WRITE = (Exception, CheckpointException)  # the latter is no Exception
OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class Snapshot:
    """A method as it was at `step`, in host memory: nothing of it changes while it is written."""

    step: int
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]


def facts_of(config: PretrainConfig, images: ImageFolder) -> dict[str, Any]:
    """What checkpoint.json says of a run beside its state: settings without secrets, the code, the list of images."""
    kept = without_secrets(config).model_dump(mode="json")
    return {"config": kept, "versions": package_versions(), "git": git_state(), "images": listed(images)}


def snapshot(method: Method, facts: dict[str, Any], world: World) -> Snapshot:
    """Copy the method to host memory: a training has to wait for nothing else. Called by all ranks.

    Args:
        method: what to save.
        facts: plain values for checkpoint.json beside those of the state: `facts_of`, and what is to go on.
        world: this process.
    """
    # safetensors has no strides: channels-last weights are written in their logical order.
    copies = {name: _to_host(tensor) for name, tensor in replicated_tensors(method).items()}
    if method.queue is not None:
        copies["queue"] = as_sharded(_to_host(method.queue.keys), method.queue.size, world)
    for name, encoder in _with_statistics(method).items():
        row = _to_host(_as_row(running_statistics(encoder)))
        copies[f"{name}.running_statistics"] = as_sharded(row, world.world_size, world)
    manifest = {
        "step": method.step,
        "world_size": world.world_size,
        "queue_size": method.queue.size if method.queue else 0,
        "loss_scale": method.engine.scaler.state_dict(),
        **facts,
    }
    return Snapshot(method.step, copies, manifest)


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
        # The writer makes the folder too, and where one rank cannot, all raise.
        writer = _Writer(str(partial), save_distributed=True)
        with _alone_on_purpose():
            dcp.save(taken.tensors, storage_writer=writer, no_dist=world.world_size == 1, process_group=group)
        if world.is_main:
            paths = [partial / name for name in writer.written]
            files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
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


class _Writer(dcp.HuggingFaceStorageWriter):
    """Knows on rank 0, where alone `finish` is called, what all ranks have written.

    Attributes:
        written: names of the files.
    """

    written: Sequence[str] = ()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Refuse a checkpoint of which rank 0 does not see every file: RUN may be another folder on another host."""
        super().finish(metadata, results)
        self.written = sorted({result.storage_data.relative_path for part in results for result in part})
        missing = [name for name in self.written if not Path(self.path, name).is_file()]
        if missing:
            raise OSError(f"{missing[0]} of another rank is not here; RUN has to lie on a disk that all hosts share")


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
        files = read_manifest(folder)["files"]
    except UserError as error:
        return str(error)  # all ranks read this file
    found = []
    for name, expected in sorted(files.items())[world.rank :: world.world_size]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif _sha256(path) != expected["sha256"]:
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
    manifest = read_manifest(folder)
    tensors = replicated_tensors(method)
    if method.queue is not None:
        if manifest["queue_size"] != method.queue.size:
            raise UserError(
                f"{folder} has a queue of {manifest['queue_size']} keys; moco.queue_size is {method.queue.size}"
            )
        tensors["queue"] = as_sharded(method.queue.keys, method.queue.size, world)
    saved_worlds = manifest["world_size"]
    rows = {}
    for name, encoder in _with_statistics(method).items():
        row = _as_row(running_statistics(encoder))
        rows[name] = tensors[f"{name}.running_statistics"] = row.new_empty(saved_worlds, row.shape[1])
    _read(tensors, folder, world)
    method.engine.load_optimizer_tensors(
        {name.removeprefix(OPTIMIZER): value for name, value in tensors.items() if name.startswith(OPTIMIZER)}
    )
    for name, encoder in _with_statistics(method).items():
        row = rows[name][world.rank] if saved_worlds == world.world_size else rows[name].mean(0)
        _fill_from_row(running_statistics(encoder), row)
    if manifest["loss_scale"]:
        method.engine.scaler.load_state_dict(manifest["loss_scale"])
    method.step = manifest["step"]


def load_query_encoder(encoder: nn.Module, folder: Path) -> int:
    """Fill `encoder` with a checkpoint's query encoder, its running statistics averaged; returns the step."""
    manifest = read_manifest(folder)
    tensors = {f"query_encoder.{name}": p.detach() for name, p in encoder.named_parameters()}
    if not (statistics := running_statistics(encoder)):
        _read(tensors, folder, World())
        return manifest["step"]
    row = _as_row(statistics)
    rows = tensors["query_encoder.running_statistics"] = row.new_empty(manifest["world_size"], row.shape[1])
    _read(tensors, folder, World())
    _fill_from_row(statistics, rows.mean(0))
    return manifest["step"]


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


def without_secrets(config: PretrainConfig) -> PretrainConfig:
    """The config as files may hold it: a user and password in tracking.uri are left out."""
    uri = config.tracking.uri
    tracking = config.tracking.model_copy(update={"uri": without_credentials(uri) if uri else uri})
    return config.model_copy(update={"tracking": tracking})


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


def _read(tensors: dict[str, Tensor], folder: Path, world: World) -> None:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with _alone_on_purpose():
            dcp.load(tensors, storage_reader=reader, no_dist=world.world_size == 1)
    except (CheckpointException, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        failures = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        if found := next((e for e in failures if isinstance(e, OSError) and e.errno), None):
            raise InfrastructureError(f"{folder} cannot be read: {(found.strerror or str(found)).lower()}") from error
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder} does not fit this config or is damaged: {reason}") from error


@contextlib.contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Silence the warning that there is no process group: a world of one has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _to_host(tensor: Tensor) -> Tensor:
    """A copy of its own in host memory, in logical order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_statistics(method: Method) -> dict[str, nn.Module]:
    """The encoders that have running statistics: those with BatchNorm."""
    return {name: encoder for name, encoder in method.encoders.items() if running_statistics(encoder)}


def _as_row(statistics: dict[str, Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in statistics.values()])[None]


def _fill_from_row(statistics: dict[str, Tensor], row: Tensor) -> None:
    for buffer, piece in zip(statistics.values(), row.split([b.numel() for b in statistics.values()]), strict=True):
        buffer.copy_(piece.view_as(buffer))
