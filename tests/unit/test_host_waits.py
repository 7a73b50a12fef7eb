"""A step leaves everything on the device: the host waits for it at log steps alone.

Where there is no GPU its place is taken by the device `meta`, whose tensors have no values: one that is read raises.
"""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moco_dist.data.batch import CropBatch
from moco_dist.data.key_views import KeyExchange
from moco_dist.data.plan import Plan
from moco_dist.data.views import Views
from moco_dist.distributed.world import World
from moco_dist.method import infonce
from moco_dist.method.build import build_method
from tests.distributed.program import images, small_config

READS_ON_THE_HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select", "allclose")


class Waits(TorchDispatchMode):
    """Notes the operations that wait for a GPU: values read by the host, and copies that are not asynchronous.

    The queue's pointer is an integer on the CPU, which may be read.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in READS_ON_THE_HOST and args[0].is_floating_point():
            self.found.append(name)
        if name == "_fused_sgd_" and args[0][0].is_meta:
            return None  # it has no kernel there
        result = func(*args, **kwargs)
        sources, targets = _devices([args, kwargs]), _devices(result)
        crosses = len(sources | targets) > 1
        if name in ("_to_copy", "copy_") and crosses and not _is_non_blocking(func, args, kwargs):
            self.found.append(f"{name} {sources} to {targets}")
        if name.startswith("index") and crosses:
            self.found.append(f"{name} by an index on the CPU")
        return result


def _is_non_blocking(func, args, kwargs):
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("non_blocking")
    return args[place] if place < len(args) else kwargs.get("non_blocking", False)


def _devices(nest):
    """The devices of tensors that are not scalars: those may be on the CPU in any operation."""
    if isinstance(nest, torch.Tensor):
        return {nest.device.type} if nest.dim() else set()
    if isinstance(nest, dict):
        nest = list(nest.values())
    return set().union(*map(_devices, nest)) if isinstance(nest, list | tuple) else set()


def waits_of_a_step(config, world, is_log_step=False):
    """What `Waits` found in a second step, after one that made what is made once."""
    method = build_method(config, world)
    plan = Plan(160, config.optim.global_batch_size, 0)
    views = images(next(method.query_encoder.parameters()).dtype)[: config.optim.global_batch_size, 0].to(world.device)
    order = torch.from_numpy(plan.key_permutation(0)).to(world.device)
    for seen in (Waits(), Waits()):
        with seen:
            method.train_step(Views(views, views, order), 0.1, is_log_step)
    return seen.found


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("sgd", "fp64"), ("lars", "fp32"), ("sgd", "bf16"), ("lars", "fp16")]
)
def test_no_value_is_read(optimizer, precision):
    """The loss scaler's part too, which looks for gradients that are not finite."""
    config = small_config(optim={"optimizer": optimizer, "precision": precision, "grad_accum_steps": 2,
                                 "global_batch_size": 32})  # fmt: skip
    assert waits_of_a_step(config, World()) == []


@pytest.mark.parametrize("is_log_step", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_nothing_waits_for_the_device(monkeypatch, optimizer, is_log_step):
    """From the key encoder to the queue."""
    monkeypatch.setattr(infonce, "weighted_sums", lambda q, keys, tau: infonce._by_blocks(q, keys, tau))
    make_scaler = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", lambda self, _, **values: make_scaler(self, "cpu", **values))
    optimizer_module = sys.modules["torch.optim.optimizer"]  # torch.optim hides its name
    monkeypatch.setattr(optimizer_module, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    config = small_config(optim={"optimizer": optimizer, "precision": "fp32", "grad_accum_steps": 2})
    assert waits_of_a_step(config, World(device="meta"), is_log_step) == []


@pytest.mark.parametrize("way", ["loader", "all_to_all", "all_gather"])
def test_key_views_wait_for_nothing(monkeypatch, way):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    config = small_config(shuffle={"exchange": way})
    views = torch.empty(64, 3, 32, 32, dtype=torch.uint8, device="meta")
    colours, samples = torch.empty(64, 10, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    batch = CropBatch(views, views, samples, samples, colours, colours, samples)
    with Waits() as seen:
        keys = KeyExchange(config, Plan(160, 64, 0), World(device="meta")).coloured(
            batch, 0, torch.bfloat16,
            colour=lambda views, *_: views.to(torch.bfloat16),  # tests/unit/test_augment.py looks at colours
        )  # fmt: skip
    assert keys.shape == views.shape
    assert seen.found == []


def test_waiting_is_noticed():
    """The tests above can fail."""
    with Waits() as seen:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        x, rows = torch.empty(4, 2, device="meta"), torch.arange(4)
        x[rows]
        rows.to("meta")
        rows.to("meta", non_blocking=True)
        with pytest.raises(RuntimeError, match="meta tensors"):
            x.sum().item()
    assert seen.found == ["_local_scalar_dense", "nonzero", "index by an index on the CPU",
                          "_to_copy {'cpu'} to {'meta'}", "_local_scalar_dense"]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(optimizer, precision):
    """By CUDA's own word."""
    config = small_config(optim={"optimizer": optimizer, "precision": precision})
    world = World(device="cuda:0")
    method = build_method(config, world)
    views = images(torch.float32)[:64, 0].cuda()
    order = torch.from_numpy(Plan(160, 64, 0).key_permutation(0)).cuda()
    try:
        for mode in ("default", "error"):  # the first step chooses algorithms and compiles the kernel
            torch.cuda.set_sync_debug_mode(mode)
            method.train_step(Views(views, views, order), 0.1, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
