"""Channels-last end to end: no operation of a step copies an image tensor into another memory layout."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from moco_dist.config.pretrain import AugmentConfig
from moco_dist.data.colours import COLOUR_COLUMNS, apply_colours
from moco_dist.data.plan import Plan
from moco_dist.data.views import Views
from moco_dist.distributed.world import World
from moco_dist.method.build import build_method
from moco_dist.method.encoder import Encoder
from tests.distributed.program import small_config

# On a CPU, PyTorch's convolutions leave weight gradients in the default layout, and its fused SGD turns them again.
WEIGHT_GRADIENTS = ("aten::convolution_backward", "aten::_fused_sgd_")


def layout_copies(function, weights=()):
    """(shape, strides from, strides to) of every copy between two layouts of a 4-D tensor in `function()`.

    The profiler sees the copies that kernels make for themselves, which Python does not.

    Args:
        function: what to look at.
        weights: shapes of weights, whose gradients PyTorch turns by itself.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, with_stack=True) as seen:
        function()
    found = []
    events = [(event, ()) for event in seen.profiler.kineto_results.experimental_event_tree()]
    while events:
        event, parents = events.pop()
        events += [(child, (*parents, event.name)) for child in event.children]
        tensors = [x for x in getattr(event.typed[1], "inputs", []) if hasattr(x, "strides")]
        if event.name != "aten::copy_" or len(tensors) < 2 or len(tensors[0].sizes) != 4:
            continue
        shape, to, source = tuple(tensors[0].sizes), tensors[0].strides, tensors[1].strides
        is_turned = any(to[dim] != source[dim] for dim in range(4) if shape[dim] > 1)  # others' strides mean nothing
        is_known = shape in weights and any(name in parents for name in WEIGHT_GRADIENTS)
        if is_turned and tuple(tensors[1].sizes) == shape and not is_known:
            found.append((shape, tuple(source), tuple(to)))
    return found


def a_step(group, **optim):
    """A function that takes one whole step on views as the colours leave them; and the weights' shapes."""
    settings = {"precision": "fp32", "global_batch_size": 16, **optim}
    config = small_config(model={"arch": "resnet10", "head_hidden_dims": [24], "embedding_dim": 16,
                                 "bn_group_size": group}, optim=settings)  # fmt: skip
    method = build_method(config, World())
    # 80 pixels leave 3 x 3 in the last stage: with one pixel all layouts are the same.
    crops = torch.zeros(16, 80, 80, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as loaders hand them over
    colours = torch.zeros(16, len(COLOUR_COLUMNS))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    order = torch.from_numpy(Plan(160, 16, 0).key_permutation(0))
    views = apply_colours(crops, colours, AugmentConfig(), dtype)
    shapes = {tuple(p.shape) for p in method.query_encoder.parameters()}
    return lambda: method.train_step(Views(views, views, order), 0.1, False), shapes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("group", "accum"), [(16, 1), (4, 1), (4, 2)])
def test_a_step_copies_no_layout(precision, group, accum):
    assert layout_copies(*a_step(group, precision=precision, grad_accum_steps=accum)) == []


def test_crops_become_views_in_one_copy():
    """Planes of one channel are what a CPU computes on; a batch is turned on its way in and out, never in between."""
    crops = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    copies = layout_copies(lambda: apply_colours(crops, torch.zeros(2, len(COLOUR_COLUMNS)), AugmentConfig()))
    assert len(copies) == 2


class Contiguous(nn.Module):
    """A mistake."""

    def forward(self, x):
        return x.contiguous()


def test_a_layout_copy_is_noticed(monkeypatch):
    build = Encoder.__init__

    def with_a_mistake(self, *args):
        build(self, *args)
        self.backbone.layer2.add_module("mistake", Contiguous())

    monkeypatch.setattr(Encoder, "__init__", with_a_mistake)
    assert layout_copies(*a_step(4))


@pytest.mark.gpu
@pytest.mark.parametrize("group", [16, 4])
def test_on_a_gpu(group):
    """CuDNN says by the names of its kernels what it turns around."""
    config = small_config(model={"arch": "resnet50", "bn_group_size": group},
                          optim={"precision": "bf16", "global_batch_size": 16})  # fmt: skip
    world = World(device="cuda:0")
    method = build_method(config, world)
    crops = torch.zeros(16, 224, 224, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    views = apply_colours(crops, torch.zeros(16, len(COLOUR_COLUMNS), device="cuda"), AugmentConfig(), torch.bfloat16)
    order = torch.from_numpy(Plan(160, 16, 0).key_permutation(0)).cuda()
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            method.train_step(Views(views, views, order), 0.1, False)
    names = {event.key for event in seen.key_averages()}
    assert not [name for name in names if "nchwToNhwc" in name or "nhwcToNchw" in name]
