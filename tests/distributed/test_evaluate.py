"""kNN and linear evaluation on several ranks give what one process gives, and count every image once."""

import functools

import pytest
import torch

from moco_dist.config import LinearConfig
from moco_dist.distributed.world import World
from moco_dist.evaluate.features import Features
from moco_dist.evaluate.knn import knn_accuracy
from moco_dist.evaluate.linear import cached_batches, standardise, train_classifier
from tests.unit.test_knn import CLASSES, clusters
from tests.world import run

NUM_TRAIN, NUM_VAL, DIM = 230, 61, 8


def share(values, labels, world, cuts):
    """This rank's rows between two cuts: shards of different sizes, some of them empty."""
    first, last = cuts[world.rank], cuts[world.rank + 1]
    return values[first:last], labels[first:last], torch.arange(first, last)


def cuts_of(total, world_size):
    """Uneven: rank 0 has nothing where there are three, the last has most."""
    return {1: [0, total], 2: [0, total // 5, total], 3: [0, 0, total // 3, total]}[world_size]


def knn(world):
    train, val = clusters(NUM_TRAIN, DIM, 0), clusters(NUM_VAL, DIM, 1)
    train_share = share(*train, world, cuts_of(NUM_TRAIN, world.world_size))[:2]
    val_share = share(*val, world, cuts_of(NUM_VAL, world.world_size))[:2]
    return knn_accuracy(*train_share, *val_share, [1, 10, NUM_TRAIN], 0.07, CLASSES, world)


@pytest.mark.parametrize("world_size", [2, 3])
def test_knn_is_the_same_on_any_number_of_ranks(world_size):
    expected = knn(World())
    for found in run(knn, world_size):
        assert found == expected


def linear(world, seed=0, epochs=4):
    config = LinearConfig(run_dir="unused", epochs=epochs, milestones=(3,), global_batch_size=32, lr=1.0, seed=seed)
    splits = []
    for (values, labels), total in ((clusters(NUM_TRAIN, DIM, 0), NUM_TRAIN), (clusters(NUM_VAL, DIM, 1), NUM_VAL)):
        splits.append(Features(*share(values.double(), labels, world, cuts_of(total, world.world_size)), total))
    train, val = splits
    standardise(train, val, world)
    torch.set_default_dtype(torch.float64)
    return train_classifier(functools.partial(cached_batches, train, config), val, CLASSES, config, world)


@pytest.mark.parametrize("world_size", [2, 3])
def test_linear_is_the_same_on_any_number_of_ranks(world_size):
    (accuracy, curve), *_ = run(linear, 1)
    assert 0 < accuracy["linear_top1"] < 100
    assert accuracy["linear_top1"] * NUM_VAL / 100 == pytest.approx(round(accuracy["linear_top1"] * NUM_VAL / 100))
    for found, found_curve in run(linear, world_size):
        assert found == accuracy
        for ours, expected in zip(found_curve, curve, strict=True):
            assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-12)


def test_the_seed_matters():
    assert run(linear, 1, 0)[0][1] != run(linear, 1, 1)[0][1]


def separable(world):
    """Two classes that a plane divides."""
    values = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    values[:, 0] += 4 * values[:, 0].sign()
    labels = (values[:, 0] > 0).long()
    rows = torch.arange(len(values))[world.rank :: world.world_size]
    features = Features(values[rows], labels[rows], rows, len(values))
    config = LinearConfig(run_dir="unused", epochs=10, global_batch_size=40)
    val = Features(features.values.clone(), features.labels, rows, len(values))
    return train_classifier(functools.partial(cached_batches, features, config), val, 2, config, world)[0]


def test_what_can_be_separated_is():
    assert [found["linear_top1"] for found in run(separable, 2)] == [100.0, 100.0]
