"""The linear probe during training against ridge regression written out in numpy."""

import numpy as np
import pytest
import torch

from moco_dist.distributed.world import World
from moco_dist.evaluate import during_training
from moco_dist.evaluate import features as features_module
from moco_dist.evaluate.during_training import effective_rank, ridge_accuracy
from moco_dist.evaluate.features import Features, standardise
from tests.unit.clusters import CLASSES, clusters
from tests.world import run


def features(num, dim, seed):
    values, labels = clusters(num, dim, seed)
    return Features(values, labels, torch.arange(num), num)


def plain_accuracy(train, val, ridge):
    """By an explicit inverse, with the intercept as a column of ones that is not penalised."""
    mean, std = train.values.double().mean(0), train.values.double().std(0, correction=0)
    x, z = (((f.values.double() - mean) / std / f.values.shape[1] ** 0.5).numpy() for f in (train, val))
    x, z = (np.hstack([a, np.ones((len(a), 1))]) for a in (x, z))
    penalty = np.eye(x.shape[1]) * ridge * len(x) / (x.shape[1] - 1)
    penalty[-1, -1] = 0
    weights = np.linalg.inv(x.T @ x + penalty) @ x.T @ np.eye(CLASSES)[train.labels.numpy()]
    return 100 * ((z @ weights).argmax(1) == val.labels.numpy()).mean()


@pytest.mark.parametrize("num_train", [300, 12])  # fewer samples than dimensions, too
def test_equals_ridge_regression_written_out(num_train, monkeypatch):
    monkeypatch.setattr(during_training, "CHUNK", 100)
    train, val = features(num_train, 16, 0), features(150, 16, 1)
    expected = plain_accuracy(train, val, during_training.RIDGE)
    standardise(train, val, World())
    assert ridge_accuracy(train, val, CLASSES, World()) == pytest.approx(expected)
    assert 100 / CLASSES < expected < 100


def test_features_that_have_collapsed_tell_the_commonest_class():
    train, val = features(40, 6, 0), features(30, 6, 1)
    for part in (train, val):
        part.values.fill_(0.3)
        part.labels[: part.total * 2 // 3] = 2
    standardise(train, val, World())
    share = 100 * (val.labels == 2).double().mean().item()
    assert ridge_accuracy(train, val, CLASSES, World()) == pytest.approx(share)


@pytest.mark.parametrize("num", [300, 12])
def test_rankme_is_that_of_the_singular_values(num, monkeypatch):
    monkeypatch.setattr(during_training, "CHUNK", 100)
    found = features(num, 16, 0)
    singular = np.linalg.svd(found.values.double().numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert effective_rank(found, World()) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_rankme_counts_dimensions():
    axes = torch.eye(8).repeat(3, 1)
    assert effective_rank(_features(axes), World()) == pytest.approx(8, rel=1e-4)
    assert effective_rank(_features(torch.ones(20, 8)), World()) == pytest.approx(1, rel=1e-3)
    assert effective_rank(_features(torch.zeros(20, 8)), World()) == pytest.approx(1, rel=1e-3)


def shared_rank(world, values):
    own = values[world.rank :: world.world_size]
    part = torch.arange(len(own))
    return effective_rank(Features(own, part, part, len(values)), world)


def test_rankme_is_that_of_all_ranks_features():
    found = features(50, 16, 0)
    assert run(shared_rank, 2, found.values) == pytest.approx([effective_rank(found, World())] * 2)


def test_features_are_standardised_some_rows_at_a_time(monkeypatch):
    """What a copy in float64 would need memory for; the same but for float64's rounding of the sums."""
    torch.manual_seed(0)
    values = torch.randn(50, 8) * 3 + 1
    whole, parts = (_features(values.clone()) for _ in range(2))
    standardise(whole, _features(values[:3].clone()), World())
    monkeypatch.setattr(features_module, "STANDARDISE_ROWS", 7)
    val = _features(values[:3].clone())
    standardise(parts, val, World())
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(val.values, whole.values[:3], rtol=1e-6, atol=1e-7)
    exact = (values.double() - values.double().mean(0)) / (values.double().std(0, correction=0) * 8**0.5)
    torch.testing.assert_close(parts.values.double(), exact, rtol=1e-5, atol=1e-6)


def _features(values):
    count = torch.arange(len(values))
    return Features(values, count, count, len(values))
