"""InfoNCE as attention against cat + cross_entropy in float64: value, gradient, precision, size."""

import math
import resource

import pytest
import torch
import torch.nn.functional as F

from moco_dist.distributed.world import World
from moco_dist.method import infonce
from moco_dist.method.infonce import contrastive_accuracy, info_nce, unshuffle, weighted_sums
from tests.world import run


def unit(rows, dim=128, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def plain(q, k, keys, temperature):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ keys.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def loss_and_gradient(function, q):
    q = q.clone().requires_grad_()
    loss = function(q)
    loss.backward()
    return loss.detach(), q.grad


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.2, 10.0])
@pytest.mark.parametrize("num_keys", [1, 5000])
def test_equals_cross_entropy_in_float64(temperature, num_keys):
    q, k, keys = unit(32), unit(32, seed=1), unit(num_keys, seed=2)
    k[:8] = F.normalize(q[:8] + 0.1 * k[:8], dim=1)  # some positives that are close
    ours = loss_and_gradient(lambda q: info_nce(q, k, q.detach(), keys, temperature, World()), q)
    theirs = loss_and_gradient(lambda q: plain(q, k, keys, temperature), q)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("temperature", "floor"), [(0.07, 0.09), (0.1, 1.69), (0.2, 6.19), (0.5, 9.11)])
def test_the_loss_of_pairs_that_agree_in_a_random_queue(temperature, floor):
    """Which docs/reproduce.md gives for the first steps and as the floor."""
    q, keys = unit(8), unit(65536, seed=2)
    loss = info_nce(q, q, q, keys, temperature, World()).item()
    formula = math.log1p(65536 * math.exp(1 / (2 * 128 * temperature**2) - 1 / temperature))
    assert loss == pytest.approx(formula, abs=0.02)
    assert loss == pytest.approx(floor, abs=0.02)


def test_float32_gradient_is_within_5e7_of_float64():
    """What the documentation states for fp32, at the paper's K and temperature."""
    q, k, keys = unit(64), unit(64, seed=1), unit(65536, seed=2)
    exact = loss_and_gradient(lambda q: plain(q, k, keys, 0.2), q)[1] * len(q)
    q32, k32, keys32 = q.float(), k.float(), keys.float()
    ours = loss_and_gradient(lambda q: info_nce(q, k32, q.detach(), keys32, 0.2, World()), q32)[1] * len(q)
    assert (ours.double() - exact).abs().max() < 5e-7


def test_bfloat16_gradient_is_within_5e4_of_float64():
    """Why embeddings, loss and queue stay float32: this is the error if q and the queue were rounded."""
    q, k, keys = unit(64), unit(64, seed=1), unit(65536, seed=2)
    exact = loss_and_gradient(lambda q: plain(q, k, keys, 0.2), q)[1] * len(q)
    rounded = weighted_sums(q.bfloat16(), keys.bfloat16(), 0.2)
    assert rounded.dtype == torch.float32
    out, lse = rounded[:, :-1] / rounded[:, -1:], rounded[:, -1].log() + 1 / 0.2
    ours = loss_and_gradient(lambda q: infonce._InfoNCE.apply(q, k.float(), out, lse, 0.2), q.float())[1] * len(q)
    assert 1e-5 < (ours.double() - exact).abs().max() < 5e-4


def many_keys(world):
    """Of 64 queries against 4 million keys: the loss, what it should be, and the memory in bytes that it took."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(64, 16), dim=1) for _ in range(2))
    keys = torch.empty(4_000_000, 16)
    for block in keys.split(100_000):  # no second copy of them while they are made
        block.copy_(F.normalize(torch.randn(len(block), 16), dim=1))
    info_nce(q, k, q, keys[:1000], 0.2, world)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss, _ = loss_and_gradient(lambda q: info_nce(q, k, q.detach(), keys, 0.2, world), q)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    parts = [torch.logsumexp(q.double() @ block.double().T / 0.2, 1) for block in keys.split(100_000)]
    positive = (q * k).sum(1).double() / 0.2
    lse = torch.logsumexp(torch.stack([positive, *parts]), 0)
    return loss.item(), (lse - positive).mean().item(), used


@pytest.mark.slow
def test_four_million_keys_need_no_logits():
    """Logits of 64 x 4,000,000 float32 would take 1 GB."""
    loss, expected, used_bytes = run(many_keys, 1)[0]
    assert loss == pytest.approx(expected, abs=1e-5)
    assert used_bytes < 32e6


def test_the_upstream_gradient_counts():
    q, k, keys = unit(4), unit(4, seed=1), unit(10, seed=2)
    once = loss_and_gradient(lambda q: info_nce(q, k, q.detach(), keys, 0.2, World()), q)[1]
    thrice = loss_and_gradient(lambda q: 3 * info_nce(q, k, q.detach(), keys, 0.2, World()), q)[1]
    torch.testing.assert_close(thrice, 3 * once)


def largest_error(sums, expected):
    """Relative to the sum of weights, which bounds every number of a row."""
    return ((sums - expected).abs() / expected[:, -1:]).max()


@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.2])
def test_ways_to_sum_agree(monkeypatch, temperature):
    """The blocked way, which devices without a kernel take, at a block that doesn't divide K."""
    monkeypatch.setattr(infonce, "_BLOCK_ROWS", 300)
    q, keys = unit(8), unit(1000, seed=2)
    assert largest_error(infonce._by_blocks(q, keys, temperature), weighted_sums(q, keys, temperature)) < 1e-13


def test_parts_of_the_queue_add_up():
    q, keys = unit(8), unit(1000, seed=2)
    parts = sum(weighted_sums(q, part, 0.07) for part in (keys[:1], keys[1:700], keys[700:], keys[:0]))
    assert largest_error(parts, weighted_sums(q, keys, 0.07)) < 1e-13


@pytest.mark.parametrize("num_keys", [4096, 1002, 7])
def test_idle_threads_take_parts_of_the_queue(monkeypatch, num_keys):
    """As many as divide it, and only where there are fewer blocks of queries than threads."""
    kernel, heads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []
    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu",
        lambda q, *rest, **more: heads.append(q.shape[1]) or kernel(q, *rest, **more),
    )  # fmt: skip
    keys = unit(num_keys)
    for count in (40, 128):
        q = unit(count, seed=1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        alone = weighted_sums(q, keys, 0.2)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
        torch.testing.assert_close(weighted_sums(q, keys, 0.2), alone)
    parts = {4096: 4, 1002: 2, 7: 1}[num_keys]
    assert heads == [1, parts, 1, min(2, parts)]


def test_contrastive_accuracy_counts_negatives_above_the_positive():
    q = torch.eye(4, 8)
    k = F.normalize(q + 0.5 * torch.eye(4, 8).roll(4, dims=1), dim=1)
    keys = torch.zeros(6, 8)
    keys[:5, 0] = 1.0  # five keys beat the first query's positive, none the others'
    top1, top5 = contrastive_accuracy(q, k, keys, World())
    assert (top1.item(), top5.item()) == (75.0, 75.0)
    top1, top5 = contrastive_accuracy(q, k, keys[1:], World())
    assert (top1.item(), top5.item()) == (75.0, 100.0)


def test_unshuffle_brings_keys_home():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    keys = unit(10)
    torch.testing.assert_close(unshuffle(keys[order], order), keys)
