"""Evaluation on a GPU that is not there: features, kNN, the probe and linear classifiers stay on one device."""

import pytest
import torch

from moco_dist.distributed.world import World
from moco_dist.evaluate.classifiers import initial_classifier, top_accuracies
from moco_dist.evaluate.during_training import ridge_accuracy
from moco_dist.evaluate.features import Features, standardise
from moco_dist.evaluate.knn import knn_accuracy
from moco_dist.evaluate.subject import FrozenEncoder
from moco_dist.method.encoder import build_encoder
from moco_dist.planning.fake_gpu import DEVICE, fake_rank
from moco_dist.planning.watch import Watch
from tests.planning.config import config_of

CLASSES, WORLD = 5, World(device=str(DEVICE))


@pytest.fixture
def watch():
    with fake_rank(WORLD), Watch() as on:
        yield on


def features(count):
    values, rows = torch.empty(count, 16, device=DEVICE), torch.empty(count, dtype=torch.int64, device=DEVICE)
    return Features(values, rows, rows, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_waits_for_nothing(watch, dtype):
    config = config_of()
    module = build_encoder(config.model, 0).to(WORLD.device).backbone.eval()
    encoder = FrozenEncoder("trained", 0, module, module.inplanes, config, dtype, WORLD.device)
    views = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    encoder(views.pin_memory())  # makes what is made once
    with watch.counting(may_wait=False) as count:
        found = encoder(views.pin_memory())
    assert (found.shape, found.dtype, found.device) == ((4, module.inplanes), torch.float32, DEVICE)
    assert count.flops > 0


def test_standardising_waits_for_nothing(watch):
    with watch.counting(may_wait=False):
        standardise(features(40), features(8), WORLD)


def test_only_results_are_read(watch):
    train, val = features(40), features(8)
    with watch.counting(may_wait=True) as count:
        knn_accuracy(train.values, train.labels, val.values, val.labels, [1], 0.1, CLASSES, WORLD)
        ridge_accuracy(train, val, CLASSES, WORLD)
        top_accuracies(initial_classifier(16, CLASSES, 0).to(DEVICE), val, WORLD)
    assert 0 < len(count.host_reads) < 20  # numbers of rows and accuracies
