"""Tensors of all ranks in safetensors files of one folder, by torch.distributed.checkpoint; no pickle in any file.

Each rank plans, writes and reads its share alone. If every rank planned all tensors, as the library would have it,
rank 0 would compare W plans of 500 tensors, and no other thread of it could launch a kernel meanwhile
(benchmarks/checkpoint_planning.py).
"""

import contextlib
import hashlib
import heapq
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future

from moco_dist.distributed.collectives import broadcast_in_place, gather_texts
from moco_dist.distributed.once import from_rank_0
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_IO, InfrastructureError, UserError
from moco_dist.run.manifest import FileFacts

_CANNOT_READ = (CheckpointException, OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError)


def shares(tensors: Mapping[str, Tensor], num_ranks: int) -> dict[str, int]:
    """Which rank writes, or reads, each tensor that all ranks hold: about the same bytes for each rank.

    A function of names and sizes alone: every rank knows the shares of all.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        load, rank = loads[0]
        owners[name] = rank
        heapq.heapreplace(loads, (load + tensors[name].nbytes, rank))
    return owners


def write(
    tensors: dict[str, Tensor], folder: Path, world: World, group: dist.ProcessGroup | None = None
) -> dict[str, FileFacts]:
    """Write this rank's share, one file a rank. Called by all ranks.

    Args:
        tensors: its part of those that all ranks hold, by `shares`, and sharded ones, of which it holds rows.
        folder: made if it is not there.
        world: this process.
        group: CPU process group to coordinate by; default: the default one.

    Returns:
        on rank 0, the files of all ranks.

    Raises:
        OSError, RuntimeError, CheckpointException: a rank cannot write; raised on all.
    """
    writer = _Writer(str(folder), save_distributed=True)
    with _alone_on_purpose():
        dcp.save(tensors, storage_writer=writer, planner=Planner(), no_dist=world.world_size == 1, process_group=group)
    return writer.files


class Planner(DefaultSavePlanner):
    """Puts the plans of all ranks together, in a time that grows with their number and not with its square.

    The library would look for overlaps among the rows of all ranks, pair by pair where a row is longer than there are
    rows, as those of running statistics are. Here no tensor is in two shares, and rows follow each other by rank.
    """

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each rank writes, and what is written in all; on rank 0.

        Raises:
            ValueError: the ranks' rows are not the whole of a tensor.
        """
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            if sum(chunk.sizes.numel() for chunk in stored.chunks) != stored.size.numel():
                raise ValueError(f"the ranks do not hold all rows of {name} {tuple(stored.size)}, or hold some twice")
        return plans, metadata


@dataclass(frozen=True)
class _WrittenFile:
    name: str
    facts: FileFacts


class _Writer(dcp.HuggingFaceStorageWriter):
    """Knows on rank 0, where alone `finish` is called, what all ranks have written. Each rank hashes its own file."""

    def __init__(self, path: str, save_distributed: bool) -> None:
        super().__init__(path, save_distributed=save_distributed)
        self.files: dict[str, FileFacts] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Write this rank's file; what rank 0 is told of it is a line, where the library tells a record a tensor."""
        written = super().write_data(plan, planner).wait()
        paths = [Path(self.path, name) for name in sorted({result.storage_data.relative_path for result in written})]
        done: Future[list[_WrittenFile]] = Future()
        done.set_result([_WrittenFile(p.name, {"bytes": p.stat().st_size, "sha256": sha256(p)}) for p in paths])
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Refuse a checkpoint of which rank 0 does not see every file: RUN may be another folder on another host."""
        super().finish(metadata, results)
        files = sorted((file for of_rank in results for file in of_rank), key=lambda file: file.name)
        self.files = {file.name: file.facts for file in files}
        missing = [name for name in self.files if not Path(self.path, name).is_file()]
        if missing:
            raise OSError(f"{missing[0]} of another rank is not here; RUN has to lie on a disk that all hosts share")


class Stored:
    """The tensors in a folder that `write` has filled, with any number of ranks; or the library's own way, before."""

    def __init__(self, folder: Path, world: World) -> None:
        """Rank 0 reads what each file holds, and tells the others. Called by all ranks.

        Raises:
            UserError: a file is damaged, or (InfrastructureError) its disk fails.
        """
        self._folder, self._world = folder, world
        self._metadata = from_rank_0(self._read_metadata, world)

    def __contains__(self, name: str) -> bool:
        return name in self._metadata.state_dict_metadata

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read `tensors` in place. Called by all ranks with the same names.

        A sharded tensor is read by the rank that holds the rows. Any other one is read by one rank, which sends it to
        the rest: a file server gives each byte once and not once a rank.

        Raises:
            UserError: on all ranks, if a tensor is missing, damaged or of another size, or (InfrastructureError) a disk
                fails.
        """
        world, problem = self._world, ""
        owners = shares({name: t for name, t in tensors.items() if not isinstance(t, DTensor)}, world.world_size)
        mine = {name: tensor for name, tensor in tensors.items() if owners.get(name, world.rank) == world.rank}
        try:
            with _alone_on_purpose():
                dcp.load(mine, storage_reader=_Reader(self._folder, self._metadata), no_dist=True)
        except _CANNOT_READ as error:
            told = _in_words(error, self._folder)
            problem = f"{told.exit_status} {told}"
        if problem := next((text for text in gather_texts(problem, world) if text), ""):
            status, _, text = problem.partition(" ")
            raise (InfrastructureError if int(status) == EXIT_IO else UserError)(text)
        for name, owner in owners.items():
            broadcast_in_place(tensors[name], owner, world)

    def _read_metadata(self) -> Metadata:
        try:
            return dcp.HuggingFaceStorageReader(str(self._folder)).read_metadata()
        except _CANNOT_READ as error:
            raise _in_words(error, self._folder) from error


class _Reader(dcp.HuggingFaceStorageReader):
    """Opens the files alone that it reads from: what all of them hold is known."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        # Rank 0 may see the folder at another path.
        here = {
            index: replace(info, relative_path=str(folder / Path(info.relative_path).name))
            for index, info in (metadata.storage_data or {}).items()
        }
        self._metadata = replace(metadata, storage_data=here)

    def read_metadata(self) -> Metadata:
        """What rank 0 has told."""
        return self._metadata


def sha256(path: Path) -> str:
    """Of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_words(error: BaseException, folder: Path) -> UserError:
    causes = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    if found := next((e for e in causes if isinstance(e, OSError) and e.errno), None):
        return InfrastructureError(f"{folder} cannot be read: {(found.strerror or str(found)).lower()}")
    reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
    return UserError(f"{folder} does not fit this config or is damaged: {reason}")


@contextlib.contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Without the warning that a rank works alone: a world of one has no group, and loading needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
