"""kNN, linear evaluation and the probe on several ranks give what one process gives, and count every image once."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moco_dist.config.evaluate import LinearConfig
from moco_dist.distributed.world import World
from moco_dist.evaluate.batches import global_batches
from moco_dist.evaluate.classifiers import held_out, initial_classifier, train_classifiers
from moco_dist.evaluate.during_training import ridge_accuracy
from moco_dist.evaluate.features import Features, standardise
from moco_dist.evaluate.knn import _write_examples, knn_accuracy
from moco_dist.evaluate.linear import _part, cached_batches
from moco_dist.run.folder import RunFolder
from tests.unit.clusters import CLASSES, clusters
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


def examples(world, folder):
    """RUN/eval/neighbours.json, as ranks make it of their shares."""
    shares, images = [], []
    for seed, total in ((0, NUM_TRAIN), (1, NUM_VAL)):
        values, labels = clusters(total, DIM, seed)
        shares.append(Features(*share(values, labels, world, cuts_of(total, world.world_size)), total))
        paths = [f"{i}.jpg" for i in range(total)]
        images.append(SimpleNamespace(root=Path("d"), paths=paths, labels=labels, classes=[*"abcdefghij"]))
    run_dir = folder / f"of_{world.world_size}"
    config = SimpleNamespace(run_dir=run_dir)
    _write_examples(SimpleNamespace(world=world, train=images[0], val=images[1], config=config), *shares)
    return run_dir


def test_examples_of_neighbours_are_the_same_images_on_any_number_of_ranks(tmp_path):
    alone = RunFolder(examples(World(), tmp_path)).neighbours.read_text()
    assert RunFolder(run(examples, 3, tmp_path)[0]).neighbours.read_text() == alone
    assert alone.count('"query"') == 8


def probe(world):
    splits = []
    for seed, total in ((0, NUM_TRAIN), (1, NUM_VAL)):
        values, labels = clusters(total, DIM, seed)
        splits.append(Features(*share(values, labels, world, cuts_of(total, world.world_size)), total))
    standardise(*splits, world)
    return ridge_accuracy(*splits, CLASSES, world)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_probe_is_the_same_on_any_number_of_ranks(world_size):
    expected = probe(World())
    assert 100 / CLASSES < expected < 100
    for found in run(probe, world_size):
        assert found == expected


SWEEP = {"lrs": (0.03, 1.0, 1e308), "weight_decays": (0.0, 1e-3), "held_out_share": 0.2}


def linear(world, seed=0, epochs=4, sweep=None):
    config = LinearConfig.model_validate({
        "run_dir": "unused", "epochs": epochs, "milestones": (3,), "global_batch_size": 32, "lr": 1.0, "seed": seed,
        "sweep": sweep or {},
    })  # fmt: skip
    splits = []
    for (values, labels), total in ((clusters(NUM_TRAIN, DIM, 0), NUM_TRAIN), (clusters(NUM_VAL, DIM, 1), NUM_VAL)):
        splits.append(Features(*share(values.double(), labels, world, cuts_of(total, world.world_size)), total))
    train, val = splits
    standardise(train, val, world)
    torch.set_default_dtype(torch.float64)
    labels = clusters(NUM_TRAIN, DIM, 0)[1].numpy()
    left_out = np.flatnonzero(held_out(labels, config.sweep.held_out_share, seed))
    return train_classifiers(
        cached_batches(train, config, world), labels, val, functools.partial(_part, train, left_out) if sweep else None,
        CLASSES, config, world,
    )  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
def test_linear_is_the_same_on_any_number_of_ranks(world_size):
    expected = run(linear, 1, 0, 4, SWEEP)[0]
    assert 0 < expected.accuracy["linear_top1"] < 100
    hits = expected.accuracy["linear_top1"] * NUM_VAL / 100
    assert hits == pytest.approx(round(hits))
    for found in run(linear, world_size, 0, 4, SWEEP):
        assert found.accuracy == expected.accuracy
        assert found.sweep == expected.sweep
        assert found.per_class == expected.per_class
        for ours, theirs in zip(found.curve, expected.curve, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-12)


def test_a_sweep_leaves_the_published_recipe_as_it_is():
    alone, swept = run(linear, 1)[0], run(linear, 1, 0, 4, SWEEP)[0]
    assert alone.accuracy == {k: v for k, v in swept.accuracy.items() if "best" not in k}
    for ours, theirs in zip(alone.curve, swept.curve, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-12)
    assert alone.sweep == []


def test_a_sweeps_classifier_is_one_trained_alone_without_the_held_out_images():
    """In plain PyTorch, one after the other, over the same batches."""
    swept = run(linear, 1, 0, 4, SWEEP)[0]
    for recipe in swept.sweep[:4]:
        assert recipe["held_out_top1"] == pytest.approx(run(plain, 1, recipe["lr"], recipe["weight_decay"])[0])
    assert all(recipe["held_out_top1"] is None for recipe in swept.sweep[4:])  # a rate of 1e308
    best = max(recipe["held_out_top1"] for recipe in swept.sweep[:4])
    assert [recipe["held_out_top1"] for recipe in swept.sweep if recipe.get("is_best")] == [best]
    assert {"linear_best_top1", "linear_best_top5"} < swept.accuracy.keys()


def plain(world, lr, weight_decay):
    """Held-out top-1 in percent of one classifier that never saw those images."""
    values, labels = clusters(NUM_TRAIN, DIM, 0)
    train = Features(values.double(), labels, torch.arange(NUM_TRAIN), NUM_TRAIN)
    standardise(train, Features(train.values[:0], labels[:0], train.rows[:0], 0), world)
    left_out = torch.from_numpy(held_out(labels.numpy(), SWEEP["held_out_share"], 0))
    torch.set_default_dtype(torch.float64)
    classifier = initial_classifier(DIM, CLASSES, 0)
    sgd = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    for epoch in range(4):
        sgd.param_groups[0]["lr"] = lr * (0.1 if epoch >= 3 else 1)
        for batch in global_batches(NUM_TRAIN, 32, 0, epoch):
            seen = torch.from_numpy(batch)[~left_out[batch]]
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(classifier(train.values[seen]), labels[seen]).backward()
            sgd.step()
    right = classifier(train.values[left_out]).argmax(1) == labels[left_out]
    return 100 * right.double().mean().item()


def test_held_out_images_are_a_share_of_every_class():
    labels = np.array([0] * 40 + [1] * 3 + [2])
    chosen = held_out(labels, 0.1, 0)
    assert [chosen[labels == label].sum() for label in range(3)] == [4, 1, 0]  # a class's only image trains
    assert (chosen != held_out(labels, 0.1, 1)).any()


def test_the_seed_matters():
    assert run(linear, 1, 0)[0].curve != run(linear, 1, 1)[0].curve


def separable(world):
    """Two classes that a plane divides."""
    values = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    values[:, 0] += 4 * values[:, 0].sign()
    labels = (values[:, 0] > 0).long()
    rows = torch.arange(len(values))[world.rank :: world.world_size]
    features = Features(values[rows], labels[rows], rows, len(values))
    config = LinearConfig(run_dir="unused", epochs=10, global_batch_size=40)
    val = Features(features.values.clone(), features.labels, rows, len(values))
    feed = cached_batches(features, config, world)
    return train_classifiers(feed, labels.numpy(), val, None, 2, config, world)


def test_what_can_be_separated_is():
    assert [found.accuracy["linear_top1"] for found in run(separable, 2)] == [100.0, 100.0]
    assert run(separable, 1)[0].per_class == [100.0, 100.0]
