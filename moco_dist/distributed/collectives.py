"""The only module that calls collectives; each is the identity in a world of one.

Bytes are what one rank receives, for a tensor of `n` bytes a rank and W ranks. Gradients are all-reduced by the
engine (DDP), which is not here.
"""

import contextlib
import datetime
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moco_dist.distributed.meeting import ended_at_once, meet
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError, UnreachableError, UserError

T = TypeVar("T")


@contextlib.contextmanager
def process_group(world: World, timeout_seconds: float = 600, alone_too: bool = False) -> Iterator[None]:
    """The default process group (NCCL on GPUs, gloo on CPU) for the length of a `with`.

    A world of one has none, unless `alone_too` (DeepSpeed asks for one). After an error the group is left as it is: to
    end it, NCCL would wait for ranks that sit in a collective, and the process ends without that. While there is a
    group, torch puts the rank before each line of an exception that nobody catches.

    Raises:
        UnreachableError: the other ranks cannot be reached.
        UserError: the ranks' variables or devices are such that there can be no group.
        InfrastructureError: NCCL cannot use this machine's devices or network.
    """
    if dist.is_initialized() or (world.world_size == 1 and not alone_too):
        yield
        return
    device = torch.device(world.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout, excepthook = datetime.timedelta(seconds=timeout_seconds), sys.excepthook
    try:
        with ended_at_once():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=dist.HashStore() if world.world_size == 1 else meet(world, timeout),
                rank=world.rank,
                world_size=world.world_size,
                timeout=timeout,
            )
    except (RuntimeError, ValueError, TimeoutError) as error:
        if (told := why_no_group(error, world)) is None:
            raise
        raise told from error
    try:
        yield
    except BaseException:
        if world.world_size == 1:
            dist.destroy_process_group()
            sys.excepthook = excepthook
        raise
    _mesh_of.cache_clear()  # or the group's connections would stay
    dist.destroy_process_group()
    sys.excepthook = excepthook


def why_no_group(error: Exception, world: World) -> UserError | None:
    """What to tell of an error that came while the process group was made; None: this error is not known."""
    text = str(error)
    of_store = isinstance(error, (dist.DistStoreError, dist.DistNetworkError, TimeoutError)) or "store->" in text
    if not of_store and re.search(r"nccl|Duplicate GPU|CUDA error|\bibv_", text, re.IGNORECASE):
        why = " ".join(text.partition("Last error:")[2].split()) or text.splitlines()[0]
        if re.search(r"nccl\w*(Usage|Argument)\b|invalid (usage|argument)|Duplicate GPU", text):
            return UserError(f"rank {world.rank} cannot use {world.device} beside the other ranks: {why}; each rank "
                             "needs a GPU of its own")  # fmt: skip
        return InfrastructureError(f"NCCL cannot start on rank {world.rank}: {why}; NCCL_DEBUG=INFO shows more, and "
                                   "TORCH_DIST_USE_NCCL2=0 takes torch's older way to it")  # fmt: skip
    if isinstance(error, ValueError):  # a variable is missing, or is no number
        return UserError(f"rank {world.rank} cannot meet the others: {text.splitlines()[0]}; start with torchrun")
    if of_store or "gloo/transport" in text:
        address = ":".join(os.environ.get(name, name) for name in ("MASTER_ADDR", "MASTER_PORT"))
        who = f"rank {world.rank} cannot meet the other {world.world_size - 1}"
        return UnreachableError(f"{who} at {address}: {text.splitlines()[0]}")
    return None


def all_gather(x: Tensor, world: World) -> Tensor:
    """The ranks' tensors of shape (n, ...) as one of (W·n, ...), in rank order. Receives (W - 1) n bytes."""
    return all_gather_in(x, None, world.world_size)


def all_gather_in(x: Tensor, group: dist.ProcessGroup | None, num_ranks: int) -> Tensor:
    """`all_gather` among the ranks of `group` (None: all)."""
    if num_ranks == 1:
        return x
    out = x.new_empty((num_ranks * x.shape[0], *x.shape[1:]))
    # torch 2.15 has a new name for it and warns of the older one, the only one that torch 2.11 knows. Given a list of
    # parts, NCCL would gather into memory of its own and then copy each part.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x.contiguous(), group=group)
    return out


def reduce_scatter_sum(x: Tensor, world: World) -> Tensor:
    """Rank r's slice of the sum over ranks: (W·n, ...) to (n, ...). Receives (W - 1)/W of x's bytes."""
    if world.world_size == 1:
        return x
    rows = x.shape[0] // world.world_size
    if x.device.type == "cpu":
        # gloo's own reduce-scatter is an all-reduce of which each rank keeps its slice: twice the bytes.
        parts = all_to_all_rows(x, [rows] * world.world_size, [rows] * world.world_size, world)
        return parts.view(world.world_size, rows, *x.shape[1:]).sum(0)
    out = x.new_empty((rows, *x.shape[1:]))
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(out, x.contiguous())
    return out


def all_reduce_sum(x: Tensor, world: World) -> Tensor:
    """The sum over ranks, on every rank. Receives 2 (W - 1)/W of x's bytes (ring)."""
    if world.world_size == 1:
        return x
    out = x.clone()
    dist.all_reduce(out)
    return out


def start_all_reduce_max(x: Tensor) -> dist.Work | None:
    """Begin the maximum over ranks of a CPU tensor, in place; `wait()` on it ends it. Receives 2 (W - 1)/W n bytes."""
    return dist.all_reduce(x, dist.ReduceOp.MAX, async_op=True)


def gather_uneven(x: Tensor, world: World) -> Tensor:
    """Like `all_gather` where ranks hold different first sizes, 0 too. Receives (W - 1) times the largest."""
    if world.world_size == 1:
        return x
    sizes = all_gather(torch.tensor([x.shape[0]], device=x.device), world).tolist()
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = x
    gathered = all_gather(padded, world).chunk(world.world_size)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def all_to_all_rows(x: Tensor, send_counts: list[int], receive_counts: list[int], world: World) -> Tensor:
    """Rows to the ranks they are for: the first send_counts[0] of x to rank 0, and so on; in rank order of senders.

    Receives the bytes of the rows that other ranks send.
    """
    if world.world_size == 1:
        return x
    out = x.new_empty((sum(receive_counts), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive_counts, send_counts)
    return out


def start_all_to_all_rows(
    x: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup | None
) -> Callable[[], Tensor]:
    """Begin `all_to_all_rows` among the ranks of `group` (counts are theirs); what is returned waits for its end."""
    out = x.new_empty((sum(receive_counts), *x.shape[1:]))
    work = dist.all_to_all_single(out, x.contiguous(), receive_counts, send_counts, group=group, async_op=True)

    def wait() -> Tensor:
        cast(dist.Work, work).wait()
        return out

    return wait


def group_of(ranks: range) -> dist.ProcessGroup | None:
    """A process group of these ranks alone, which all of them ask for; None for one rank."""
    if len(ranks) == 1:
        return None
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), use_local_synchronization=True))


def gather_texts(text: str, world: World) -> list[str]:
    """Every rank's text, on every rank. Receives a few times its bytes; for the start of a run."""
    raw = torch.tensor(list(text.encode()), dtype=torch.uint8, device=world.device)
    sizes = all_gather(torch.tensor([len(raw)], device=world.device), world).tolist()
    return [bytes(part.tolist()).decode() for part in gather_uneven(raw, world).split(sizes)]


def broadcast_value(value: T, world: World) -> T:
    """Rank 0's value, pickled, on every rank."""
    if world.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def broadcast_in_place(x: Tensor, rank: int, world: World) -> None:
    """Fill `x` with what `rank` holds, bit by bit. Receives n bytes."""
    if world.world_size == 1:
        return
    dense = x.contiguous()  # as NCCL wants it
    dist.broadcast(dense, rank)
    if dense is not x:
        x.copy_(dense)


def mean_on_rank_0(x: Tensor, world: World, group: dist.ProcessGroup | None = None) -> Tensor:
    """On rank 0, the mean of the ranks' CPU tensors, summed in float64; on others nothing of use."""
    if world.world_size == 1:
        return x.clone()
    total = x.to(torch.float64, copy=True)
    dist.reduce(total, 0, group=group)
    return (total / world.world_size).to(x.dtype)


def barrier(world: World, group: dist.ProcessGroup | None = None) -> None:
    """Every rank waits for the last."""
    if world.world_size > 1:
        dist.barrier(group)


def cpu_group(world: World) -> dist.ProcessGroup | None:
    """A process group of all ranks on the CPU, for a thread of its own; None in a world of one."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if world.world_size > 1 else None


def as_sharded(shard: Tensor, total_rows: int, world: World) -> Tensor:
    """Rank r's rows of a (total_rows, ...) tensor as one DTensor that torch.distributed.checkpoint understands.

    Nothing is received. The rows are those of `shard_bounds`.
    """
    if world.world_size == 1:
        return shard
    mesh = _mesh_of(cast(dist.ProcessGroup, dist.group.WORLD), shard.device.type)
    shape = torch.Size((total_rows, *shard.shape[1:]))
    return DTensor.from_local(shard, mesh, [Shard(0)], shape=shape, stride=shard.stride(), run_check=False)


@functools.lru_cache(maxsize=2)  # of tensors on the GPU and on the host
def _mesh_of(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """Of the group that there is: `init_device_mesh` may make a new one, with all its connections, at every call."""
    return DeviceMesh.from_group(group, device_type)


def shard_bounds(total_rows: int, world: World) -> tuple[int, int]:
    """First and past-last global row of this rank's shard: equal chunks, the last ones smaller (DTensor's rule)."""
    rows = -(-total_rows // world.world_size)
    start = min(world.rank * rows, total_rows)
    return start, min(start + rows, total_rows)
