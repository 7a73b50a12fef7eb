"""Grouped BatchNorm: the statistics of each group, one update a step, no cost for one group."""

import pytest
import torch
from torch import nn

from moco_dist.config.pretrain import ModelConfig
from moco_dist.errors import UserError
from moco_dist.method.batch_norm import GroupedBatchNorm2d, set_micro_batch
from moco_dist.method.encoder import build_encoder


def images(n=12, seed=0):
    return torch.randn(n, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def plain(groups):
    """The running statistics after one step over `groups`, by nn.BatchNorm2d on each from the same start."""
    means, variances = [], []
    for group in groups:
        norm = nn.BatchNorm2d(3).double()
        norm(group)
        means.append(norm.running_mean)
        variances.append(norm.running_var)
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("group_count", [1, 3])
def test_one_value_a_group_is_named(group_count):
    norm = GroupedBatchNorm2d(3, group_size=1)
    with pytest.raises(UserError, match="end as 1 x 1 in BN groups of 1 sample .* larger images"):
        norm(torch.ones(group_count, 3, 1, 1))
    norm.eval()(torch.ones(group_count, 3, 1, 1))


def test_each_group_is_normalised_alone():
    norm = GroupedBatchNorm2d(3, group_size=4).double()
    x = images()
    expected = torch.cat([nn.BatchNorm2d(3).double()(group) for group in x.split(4)])
    torch.testing.assert_close(norm(x), expected)
    mean, var = plain(x.split(4))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)


@pytest.mark.parametrize("micro_batch", [4, 8, 24])
def test_micro_batches_update_once(micro_batch):
    norm = GroupedBatchNorm2d(3, group_size=4).double()
    x = images(24)
    parts = x.split(micro_batch)
    out = []
    for i, part in enumerate(parts):
        set_micro_batch(norm, i, len(parts))
        out.append(norm(part))
    torch.testing.assert_close(torch.cat(out), GroupedBatchNorm2d(3, 4).double()(x))
    mean, var = plain(x.split(4))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)


def test_gradients_are_those_of_separate_groups():
    norm, x = GroupedBatchNorm2d(3, group_size=4).double(), images().requires_grad_()
    other = nn.BatchNorm2d(3).double()
    weights = images(seed=1)
    (norm(x) * weights).sum().backward()
    ours = (x.grad.clone(), norm.weight.grad, norm.bias.grad)
    x.grad = None
    (torch.cat([other(group) for group in x.split(4)]) * weights).sum().backward()
    for a, b in zip(ours, (x.grad, other.weight.grad, other.bias.grad), strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_uses_running_statistics_and_any_batch():
    norm = GroupedBatchNorm2d(3, group_size=4).double()
    norm(images())
    norm.eval()
    x = images(5, seed=2)
    before = norm.running_mean.clone()
    expected = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert torch.equal(norm.running_mean, before)


def test_a_part_of_a_group_is_refused():
    with pytest.raises(ValueError, match="10 samples are not whole BN groups of 4"):
        GroupedBatchNorm2d(3, 4).double()(images(10))


def test_an_encoder_has_torchvisions_names_and_unit_outputs():
    encoder = build_encoder(ModelConfig(arch="resnet18", head_hidden_dims=(64,), bn_group_size=2), seed=0)
    q = encoder(torch.randn(4, 3, 32, 32))
    torch.testing.assert_close(q.norm(dim=1), torch.ones(4))
    assert q.shape == (4, 128)
    assert encoder.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert [type(m).__name__ for m in encoder.head] == ["Linear", "ReLU", "Linear"]
    linear = build_encoder(ModelConfig(arch="resnet50", head_hidden_dims=()), seed=0)
    assert [m.out_features for m in linear.head] == [128]
    same, other = (build_encoder(ModelConfig(arch="resnet10"), seed=s) for s in (0, 1))
    again = build_encoder(ModelConfig(arch="resnet10"), seed=0)
    assert torch.equal(same.backbone.conv1.weight, again.backbone.conv1.weight)
    assert not torch.equal(same.backbone.conv1.weight, other.backbone.conv1.weight)


def test_small_images_keep_their_resolution_with_the_cifar_stem():
    encoder = build_encoder(ModelConfig(arch="resnet10", stem="cifar"), seed=0)
    stem = nn.Sequential(encoder.backbone.conv1, encoder.backbone.bn1, encoder.backbone.maxpool).eval()
    assert stem(torch.zeros(1, 3, 28, 28)).shape == (1, 64, 28, 28)
