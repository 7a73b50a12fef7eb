"""Weighted nearest neighbours against a plain loop in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.evaluate.knn import knn_accuracy, vote
from tests.unit.clusters import CLASSES, clusters


def plain_accuracy(train, train_labels, val, val_labels, k, temperature):
    """Wu et al. 2018, sec. 3.4, one query at a time."""
    train, val = F.normalize(train.double(), dim=1), F.normalize(val.double(), dim=1)
    correct = 0
    for query, label in zip(val, val_labels, strict=True):
        similarity = train @ query
        order = similarity.argsort(descending=True)[:k]
        votes = [0.0] * CLASSES
        for row in order.tolist():
            votes[train_labels[row]] += math.exp(similarity[row] / temperature)
        correct += votes.index(max(votes)) == label
    return 100 * correct / len(val)


def test_equals_a_plain_loop():
    train, val = clusters(300, 6, 0), clusters(70, 6, 1)
    neighbours = [20, 1, 300, 7, 20]
    found = knn_accuracy(*train, *val, neighbours, 0.07, CLASSES, World())
    assert set(found) == set(neighbours)
    for k, accuracy in found.items():
        assert accuracy == pytest.approx(plain_accuracy(*train, *val, k, 0.07)), k
    assert 30 < found[20] < 100


def test_the_temperature_counts():
    """Of many neighbours the near ones decide at a low temperature, at a high one the most frequent class."""
    train, val = clusters(300, 6, 0), clusters(70, 6, 1)
    found = {t: knn_accuracy(*train, *val, [300], t, CLASSES, World())[300] for t in (0.02, 10.0)}
    assert found[0.02] > found[10.0] + 10
    for temperature, accuracy in found.items():
        assert accuracy == pytest.approx(plain_accuracy(*train, *val, 300, temperature))


def test_more_queries_than_one_chunk():
    train, val = clusters(200, 4, 2), clusters(600, 4, 3)
    assert knn_accuracy(*train, *val, [5], 0.07, CLASSES, World())[5] == pytest.approx(
        plain_accuracy(*train, *val, 5, 0.07)
    )


def test_near_neighbours_weigh_more():
    similarity, labels = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[0, 1, 1]])
    assert vote(similarity, labels, [3], 0.07, 2).item() == 0
    assert vote(similarity, labels, [3], 10.0, 2).item() == 1


def test_the_lower_class_wins_a_tie_and_a_tiny_temperature_overflows_nothing():
    similarity, labels = torch.tensor([[0.5, 0.5]]), torch.tensor([[3, 1]])
    assert vote(similarity, labels, [2], 1e-6, 4).item() == 1


def test_k_larger_than_the_memory():
    train, val = clusters(10, 4, 2), clusters(5, 4, 3)
    with pytest.raises(UserError, match="k = 20 is more than there are training images; 10 is the most"):
        knn_accuracy(*train, *val, [20], 0.07, CLASSES, World())
