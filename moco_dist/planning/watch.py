"""What a rank asks of its GPU: operations, kernels, FLOPs, bytes on the network, memory; and where the host would wait.

Everything is counted below autograd, at torch's dispatcher, where a real GPU would be given the work.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from moco_dist.planning import fake_gpu

PACKAGE = Path(__file__).parents[1]
ALLOCATION_BYTES = 512  # torch's allocator on a GPU gives multiples of it
# Operations that give memory or another look at it, and launch nothing.
_NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view",
    "lift_fresh", "set_", "resize_",
}  # fmt: skip
# Tensors and blocks of 65,536 numbers that one launch of a multi-tensor kernel takes, by how many lists it reads
# (ATen/native/cuda/MultiTensorApply.cuh).
_TENSORS_OF_A_LAUNCH, _BLOCKS_OF_A_LAUNCH, _NUMBERS_OF_A_BLOCK = {1: 110, 2: 64, 3: 48, 4: 36}, 320, 65_536
_READS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "item"}
_SHAPES_BY_VALUES = {"nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount"}
_COLLECTIVES = {
    "allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
}  # fmt: skip


class HostWaitError(Exception):
    """The host would wait for the GPU where nobody waits."""


@dataclass
class Count:
    """What was asked of the GPU.

    Attributes:
        operations: by name.
        kernels: at the least; a library may launch several for one operation.
        flops: of matrix products and convolutions.
        received_bytes: by collective, as `distributed.collectives` counts them.
        host_reads: where a value was read, or copied to the host, with waiting.
    """

    operations: Counter[str] = field(default_factory=Counter)
    kernels: int = 0
    flops: int = 0
    received_bytes: Counter[str] = field(default_factory=Counter)
    host_reads: list[str] = field(default_factory=list)


class Watch(TorchDispatchMode):
    """Counts what is dispatched while it is on, and follows the GPU's memory. On inside `fake_rank`, from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self.memory = Memory()
        self._may_wait = True

    @contextlib.contextmanager
    def counting(self, may_wait: bool) -> Iterator[Count]:
        """A fresh `Count` for the length of a `with`.

        Raises:
            HostWaitError: without `may_wait`, at the operation for which the host would wait.
        """
        before = self.count, self._may_wait
        self.count, self._may_wait = Count(), may_wait
        try:
            yield self.count
        finally:
            self.count, self._may_wait = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        given = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        to_gpu = torch.device(kwargs.get("device") or "cpu").type in ("cuda", "meta")  # which are one, in `fake_gpu`
        on_gpu = to_gpu or any(x.is_cuda for x in given)
        if on_gpu and (reason := _wait_of(func, name, args, kwargs, given)):
            where = f"{line_of_program()}: {reason}"
            if self.count.host_reads[-1:] != [where]:  # the values of one `tolist` come in one copy
                self.count.host_reads.append(where)
            if not self._may_wait:
                raise HostWaitError(where)
            if name in _READS:
                return _some_value(func, given[0])
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for tensor in made:
            if tensor.is_cuda:
                self.memory.follow(tensor)
        if on_gpu:
            self._add(func, name, args, kwargs, result, given)
        return result

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, given: list[Tensor]) -> None:
        count = self.count
        if func.namespace == "c10d":
            count.operations[name] += 1
            if name in _COLLECTIVES:
                count.received_bytes[_COLLECTIVES[name]] += _received_bytes(name, args)
                count.kernels += 1
            return
        if func.is_view or name in _NO_KERNEL:
            return
        count.operations[name] += 1
        count.kernels += _launches(name, args, given)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            count.flops += formula(*args, **kwargs, out_val=result)
        elif name == "queue_sums":
            q, keys, _ = args
            count.flops += 4 * len(q) * keys.numel()


class Memory:
    """The GPU's memory over time. A moment is a number: how much has been allocated and freed before it.

    Attributes:
        bytes_now: allocated, and not freed.
    """

    def __init__(self) -> None:
        self.bytes_now = self._peak = 0
        self._moment = self._peak_moment = 0
        self._lives: list[
            list[int]
        ] = []  # of each storage: bytes, the moments of its birth and of its death (-1: alive)
        self._alive: dict[int, int] = {}  # storage to its life

    def follow(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        size = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._moment += 1
        life = len(self._lives)
        self._lives.append([size, self._moment, -1])
        self._alive[storage._cdata] = life
        weakref.finalize(storage, self._freed, storage._cdata, life).atexit = False
        self.bytes_now += size
        if self.bytes_now > self._peak:
            self._peak, self._peak_moment = self.bytes_now, self._moment

    def _freed(self, storage: int, life: int) -> None:
        self._moment += 1
        self._lives[life][2] = self._moment
        self.bytes_now -= self._lives[life][0]
        if self._alive.get(storage) == life:
            del self._alive[storage]

    def forget_peak(self) -> None:
        """Look for a peak from now on."""
        self._peak, self._peak_moment = self.bytes_now, self._moment

    def lives_of(self, tensors: Iterable[Tensor | None]) -> set[int]:
        """Numbers by which `at_peak` knows these tensors' storages."""
        return {self._alive[t.untyped_storage()._cdata] for t in tensors if t is not None and t.is_cuda}

    def at_peak(self, parts: dict[str, set[int]], rest: str) -> dict[str, int]:
        """Bytes by part at the moment when most was allocated, and under the name `rest` what no part has."""
        part_of = {life: name for name, lives in parts.items() for life in lives}
        found = dict.fromkeys([*parts, rest], 0)
        for life, (size, born, died) in enumerate(self._lives):
            if born <= self._peak_moment and (died == -1 or died > self._peak_moment):
                found[part_of.get(life, rest)] += size
        return found


def _wait_of(func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> str:
    """Why the host would wait at an operation; "" where it would not."""
    if name in _READS:
        return "reads a value of a tensor on the GPU"
    if name in _SHAPES_BY_VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return f"the shape of {name}'s result depends on values on the GPU"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return "an index by a mask, whose count is a value on the GPU"
        if any(not x.is_cuda for x in indices):
            return "an index that stayed on the CPU"
    if name in ("_to_copy", "copy_"):
        return _wait_of_copy(func, name, args, kwargs)
    return ""


def _wait_of_copy(func: Any, name: str, args: Any, kwargs: Any) -> str:
    if name == "copy_":
        source, to_gpu = args[1], args[0].is_cuda
        is_asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        source, device = args[0], kwargs.get("device")
        to_gpu = source.is_cuda if device is None else torch.device(device).type in ("cuda", "meta")
        is_asynchronous = kwargs.get("non_blocking", False)
    if source.is_cuda and not to_gpu:
        return "copies from the GPU to the host, which waits for it"
    if to_gpu and not source.is_cuda:
        if not is_asynchronous:
            return "copies to the GPU and waits for the copy (non_blocking)"
        if not fake_gpu.is_pinned(source):
            return "copies to the GPU from memory that is not pinned"
    return ""


def _some_value(func: Any, tensor: Tensor) -> Any:
    """A value where one may be read: nobody knows the true one."""
    if func._schema.name in ("aten::equal", "aten::allclose", "aten::is_nonzero") or tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _launches(name: str, args: Any, given: list[Tensor]) -> int:
    """Kernels of an operation, at the least."""
    if name.startswith(("_foreach_", "_fused_", "_amp_foreach_")):
        lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
        if not lists:
            return 1
        blocks = sum(-(-x.numel() // _NUMBERS_OF_A_BLOCK) for x in lists[0])
        tensors = _TENSORS_OF_A_LAUNCH[min(len(lists), max(_TENSORS_OF_A_LAUNCH))]
        return max(-(-len(lists[0]) // tensors), -(-blocks // _BLOCKS_OF_A_LAUNCH))
    if name == "convolution_backward":
        return sum(args[10])  # of its three results, those that are asked for
    return 1


def _received_bytes(name: str, args: Any) -> int:
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    if name == "allreduce_":
        ranks = dist.get_world_size()
        return sum(2 * (ranks - 1) * x.nbytes // ranks for x in args[0])
    other = args[1] if isinstance(args[1], Tensor) else args[1][0]
    if name == "alltoall_base_":
        counts, group = args[3], dist.ProcessGroup.unbox(args[2])
        own = counts[group.rank()] * first[0].nbytes if counts else first.nbytes // group.size()
        return first.nbytes - own
    return abs(first.nbytes - other.nbytes)


def line_of_program(trace: TracebackType | None = None) -> str:
    """The innermost line of this package (where there is none, of a program that uses it) in a traceback, or now."""
    frames = [frame for frame, _ in traceback.walk_stack(None)] if trace is None else [
        frame for frame, _ in traceback.walk_tb(trace)][::-1]  # fmt: skip
    lines = dict(traceback.walk_tb(trace)) if trace is not None else {}
    others = []
    for frame in frames:
        path, line = Path(frame.f_code.co_filename), lines.get(frame, frame.f_lineno)
        if path in (Path(__file__), Path(fake_gpu.__file__)):
            continue
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE.parent)}:{line}"
        if "torch" not in path.parts:
            others.append(f"{path.name}:{line}")
    return others[0] if others else "torch"
