"""One rank on a GPU that is not there: tensors with a shape, a dtype and the device `cuda`, and no memory.

torch's FakeTensorMode makes such tensors, and its `fake` process group makes this process a rank of any world. What a
real GPU would refuse, raises here: operands on two devices, a value that is asked for, a shape that depends on values.
Three things of torch need a driver, and have a stand-in here:

- The autograd engine asks the driver about each tensor's device. So C++ sees the device `meta`, Python sees `cuda`, and
  what C++ makes on `meta` is made on `cuda`. C++ then leaves out autocast's casts, which `_Autocast` makes instead.
- DistributedDataParallel times itself by CUDA's events: `_Buckets` has its buckets, copies and all-reduces.
- Triton's kernel is launched by the driver: `_queue_sums` has its memory, its launch and its arithmetic.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from moco_dist.data import colours
from moco_dist.distributed.world import World
from moco_dist.engine import ddp
from moco_dist.method import infonce
from moco_dist.planning.arithmetic import DDP_BUCKET_BYTES, DDP_FIRST_BUCKET_BYTES

DEVICE = torch.device("cuda", 0)
MULTIPROCESSORS = 132  # an H100's; the queue is split among them
# What CUDA's autocast computes in 16 bits, of the operations that encoders and classifiers have.
_IN_16_BITS = {
    torch.conv2d, torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, Tensor.matmul,
    Tensor.__matmul__, Tensor.mm,
}  # fmt: skip

# They change their operands in place, and torch has no rule of shapes for them.
_WITHOUT_SHAPE_RULE = {
    torch.ops.aten._fused_sgd_,
    torch.ops.aten._amp_foreach_non_finite_check_and_unscale_,
    torch.ops.aten._amp_update_scale_,
}
_CACHES = [colours._make_neighbours]  # what the program keeps on the GPU, whoever made it


def is_pinned(tensor: Tensor) -> bool:
    """Whether `Tensor.pin_memory` gave it, in here."""
    return getattr(tensor, "_is_pinned_in_dry_run", False)


@contextlib.contextmanager
def fake_rank(world: World) -> Iterator[None]:
    """This process as rank `world.rank` of `world`, on a GPU, for the length of a `with`.

    Everything that the rank has must be made in here. Tensors of data may be real ones on the CPU.
    """
    assert not dist.is_initialized()
    assert world.device == str(DEVICE)
    import torch._dynamo  # noqa: F401 - it takes functions of torch as they are now for its own

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copy.deepcopy
        stack.enter_context(fresh_caches())
        mode = _GPU(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        for owner, name, stand_in in _stand_ins():
            stack.enter_context(replaced(owner, name, stand_in))
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # torch puts the rank before each line of it
        if world.world_size > 1:
            dist.init_process_group("fake", rank=world.rank, world_size=world.world_size, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        stack.enter_context(mode)
        stack.enter_context(_Autocast())
        yield


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """What the program keeps on the GPU is made anew within it, and again after it."""
    for cached in _CACHES:
        cached.cache_clear()
    try:
        yield
    finally:
        for cached in _CACHES:
            cached.cache_clear()


class _GPU(FakeTensorMode):
    """FakeTensorMode for the GPU alone, of which `meta` is another name: see above. What is on the CPU is real."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        if func._overloadpacket in _WITHOUT_SHAPE_RULE:
            return args[0] if func._schema.returns else None
        kwargs = dict(kwargs or {})
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "meta":
            kwargs["device"] = DEVICE
        elif device.type == "cpu" and not any(isinstance(x, FakeTensor) for x in tree_leaves([args, kwargs])):
            return func(*args, **kwargs)
        return super().dispatch(func, types, args, kwargs)


class _Autocast(TorchFunctionMode):
    """What CUDA's autocast does before an operation of encoders: operands in 16 bits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_16_BITS and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            args = [_as(x, dtype) for x in args]
            kwargs = {name: _as(x, dtype) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _as(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_cuda and x.dtype == torch.float32 else x


class _Buckets(nn.Module):
    """DistributedDataParallel as the engine uses it: gradients are copied into buckets, which are all-reduced.

    A bucket's all-reduce begins when its last gradient is there, in the last micro-batch of a step.
    """

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module, self.require_backward_grad_sync = module, True
        parameters = [p for p in module.parameters() if p.requires_grad]
        bucket: list[nn.Parameter] = []
        most_bytes, num_bytes = DDP_FIRST_BUCKET_BYTES, 0
        for parameter in reversed(parameters):
            bucket.append(parameter)
            num_bytes += parameter.nbytes
            if num_bytes >= most_bytes or parameter is parameters[0]:
                self._make(bucket)
                bucket, most_bytes, num_bytes = [], DDP_BUCKET_BYTES, 0

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)

    def _make(self, bucket: list[nn.Parameter]) -> None:
        memory = bucket[0].new_empty(sum(p.numel() for p in bucket))
        ready: list[nn.Parameter] = []

        def collect(parameter: Tensor, place: int) -> None:
            if not self.require_backward_grad_sync or parameter.grad is None:
                return
            view = memory.as_strided(parameter.shape, parameter.stride(), place)
            torch.mul(parameter.grad, 1 / dist.get_world_size(), out=view)
            parameter.grad = view
            ready.append(parameter)  # type: ignore[arg-type]
            if len(ready) == len(bucket):
                ready.clear()
                dist.all_reduce(memory)

        place = 0
        for parameter in bucket:
            parameter.register_post_accumulate_grad_hook(lambda p, place=place: collect(p, place))
            place += parameter.numel()


class _Stream:
    """A stream: operations are done in the order in which they are asked for."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def record_event(self) -> None:
        """Nothing has to be remembered."""

    def wait_event(self, event: None) -> None:
        """It has happened."""


def _queue_sums(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """`infonce_triton.weighted_sums`: one launch, whose splits' sums are then added."""
    assert q.is_contiguous()
    assert q.device == keys.device
    splits = max(1, 2 * MULTIPROCESSORS // -(-len(q) // 32))
    return torch.ops.moco_dist.queue_sums(q, keys, splits).sum(0)


@torch.library.custom_op("moco_dist::queue_sums", mutates_args=())
def _queue_sums_op(q: Tensor, keys: Tensor, splits: int) -> Tensor:
    raise NotImplementedError("it has a shape and no values")


@_queue_sums_op.register_fake
def _(q: Tensor, keys: Tensor, splits: int) -> Tensor:
    return q.new_empty(splits, q.shape[0], q.shape[1] + 1)


def _stand_ins() -> list[tuple[Any, str, Any]]:
    """What takes the place of (owner, name)."""
    make_subclass = torch.Tensor._make_subclass

    def make(cls: type, data: Tensor, requires_grad: bool = False, **options: Any) -> Tensor:
        if cls is FakeTensor and options["device_for_backend_keys"].type == "cuda":
            options["dispatch_device"] = False
        return make_subclass(cls, data, requires_grad, **options)  # type: ignore[arg-type]

    def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
        pinned = tensor.clone()
        pinned._is_pinned_in_dry_run = True  # type: ignore[attr-defined]
        return pinned

    return [
        (torch.Tensor, "_make_subclass", staticmethod(make)),
        (FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda")),
        (torch.Tensor, "pin_memory", pin_memory),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (ddp, "DistributedDataParallel", _Buckets),
        (infonce, "_by_triton", _queue_sums),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "stream", contextlib.nullcontext),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
    ]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for the length of a `with`."""
    had = name in vars(owner)
    before = vars(owner).get(name)  # a static method as it is written
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if had else delattr(owner, name)
