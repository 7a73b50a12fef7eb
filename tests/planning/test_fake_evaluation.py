"""Evaluation on a GPU that is not there: features, kNN, probe, classifiers, fine-tuning; and what leaves the GPU.

In a world of one and, where ranks share the work, of eight. Mistakes made on purpose are found.
"""

import contextlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moco_dist.config.evaluate import DetectConfig, FinetuneConfig, LinearConfig
from moco_dist.config.pretrain import AugmentConfig, EngineConfig
from moco_dist.data.views import Views
from moco_dist.distributed.world import World
from moco_dist.engine.ddp import DDPEngine
from moco_dist.evaluate import classifiers, finetune, linear
from moco_dist.evaluate.classifiers import initial_classifier, per_class_accuracy, top_accuracies, train_classifiers
from moco_dist.evaluate.detection.detector import build_detector
from moco_dist.evaluate.detection.run import _share_gradients
from moco_dist.evaluate.during_training import effective_rank, ridge_accuracy
from moco_dist.evaluate.features import Features, standardise
from moco_dist.evaluate.knn import QUERIES, knn_accuracy
from moco_dist.evaluate.progress import Training
from moco_dist.evaluate.subject import FrozenEncoder
from moco_dist.method.build import build_method
from moco_dist.method.encoder import build_encoder
from moco_dist.planning.fake_gpu import DEVICE, fake_rank
from moco_dist.planning.watch import HostWaitError, Watch
from moco_dist.run import checkpoint
from moco_dist.run.weights import Backbone
from tests.planning.config import config_of

CLASSES, IMAGES, BATCH, SIDE = 5, 32, 16, 32
WORLDS = {1: World(device=str(DEVICE)), 8: World(5, 1, 8, 4, str(DEVICE)),
          1024: World(1023, 7, 1024, 8, str(DEVICE))}  # fmt: skip


@contextlib.contextmanager
def watching(world_size):
    with fake_rank(WORLDS[world_size]), Watch() as on:
        yield on


@pytest.fixture(params=[1, 8])
def of_world(request):
    with watching(request.param) as watch:
        yield watch, WORLDS[request.param]


@pytest.fixture
def watch():
    with watching(1) as on:
        yield on


def features(count, total=None, dim=16):
    values, rows = torch.empty(count, dim, device=DEVICE), torch.empty(count, dtype=torch.int64, device=DEVICE)
    return Features(values, rows, rows, total or count)


def frozen(config, dtype=torch.float32):
    module = build_encoder(config.model, 0).to(DEVICE).backbone.eval()
    encoder = FrozenEncoder("trained", 0, module, module.inplanes, config, dtype, str(DEVICE))
    encoder(crops(2))  # makes what is made once
    return encoder


def crops(count):
    return torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8).pin_memory()


def evaluation_of(config, world):
    images = SimpleNamespace(paths=range(IMAGES), labels=np.arange(IMAGES) % CLASSES, classes=tuple("abcde"))
    return SimpleNamespace(config=None, pretrain=config, train=images, val=images, world=world)


def crops_that_nobody_waits_for(watch):
    """In place of `crop_batches`: while a batch is worked on, the host must not wait."""

    def batches(evaluation, own, *_):
        with watch.counting(may_wait=False):
            for rows in own:
                yield crops(len(rows))

    return batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_waits_for_nothing(watch, dtype):
    encoder = frozen(config_of(), dtype)
    views = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with watch.counting(may_wait=False) as count:
        found = encoder(views.pin_memory())
    assert (found.shape, found.dtype, found.device) == ((4, encoder.dim), torch.float32, DEVICE)
    assert count.flops > 0


def test_standardising_waits_for_nothing(of_world):
    watch, world = of_world
    with watch.counting(may_wait=False):
        standardise(features(40), features(8), world)


def test_only_results_are_read(of_world):
    """And among ranks how many rows each has: the tensors here say one, so a rank has one query.

    A place is counted once, however often it reads.
    """
    watch, world = of_world
    train, val = features(40), features(1 if world.world_size > 1 else 3 * QUERIES)
    classifier = initial_classifier(16, CLASSES, 0).to(DEVICE)
    exchanged = {"collectives.py": 2} if world.world_size > 1 else {}
    results = [
        (lambda: knn_accuracy(*train_and_val, [1], 0.1, CLASSES, world), {"knn.py": 4, **exchanged}),
        (lambda: ridge_accuracy(train, val, CLASSES, world), {"during_training.py": 1}),
        (lambda: effective_rank(train, world), {"during_training.py": 1}),
        (lambda: top_accuracies(classifier, val, world), {"classifiers.py": 1}),
        (lambda: per_class_accuracy(classifier, val, CLASSES, world), {"classifiers.py": 1}),
    ]
    train_and_val = train.values, train.labels, val.values, val.labels
    for result, expected in results:
        with watch.counting(may_wait=True) as count:
            result()
        files = Counter(place.partition(":")[0].rpartition("/")[2] for place in set(count.host_reads))
        assert files == expected


def test_steps_of_the_linear_classifiers_wait_for_nothing(of_world, monkeypatch):
    """On features that were encoded once; with recipes to choose from."""
    watch, world = of_world
    config = LinearConfig(run_dir="r", epochs=2, global_batch_size=BATCH, sweep={"lrs": [1.0, 10.0]})
    ranks = torch.arange(IMAGES) % world.world_size
    monkeypatch.setattr(linear, "gather_uneven", lambda x, _: ranks if x is not train.rows else torch.arange(IMAGES))
    train = features(IMAGES // world.world_size, IMAGES)
    feed = linear.cached_batches(train, config, world)

    def nobody_waits(*place):
        with watch.counting(may_wait=False):
            yield from feed(*place)

    labels = np.arange(IMAGES) % CLASSES
    outcome = train_classifiers(nobody_waits, labels, features(8), lambda: features(8), CLASSES, config, world)
    assert len(outcome.curve) == 2
    assert len(outcome.sweep) == 2 * len(config.sweep.weight_decays)
    assert len(outcome.per_class) == CLASSES


def test_crops_of_every_epoch_are_encoded_and_gathered_without_waiting(of_world, monkeypatch):
    watch, world = of_world
    monkeypatch.setattr(linear, "crop_batches", crops_that_nobody_waits_for(watch))
    config, pretrain = LinearConfig(run_dir="r", global_batch_size=BATCH), config_of()
    encoder = frozen(pretrain)
    found = list(linear.augmented_batches(evaluation_of(pretrain, world), config, encoder, 0, 1))
    assert [(len(values), values.shape[1]) for values, _ in found] == [(BATCH, encoder.dim)] * (IMAGES // BATCH - 1)


def test_an_epoch_of_fine_tuning_waits_for_nothing(of_world, monkeypatch):
    watch, world = of_world
    dtype = {1: torch.bfloat16, 8: torch.float32}[world.world_size]
    monkeypatch.setattr(finetune, "crop_batches", crops_that_nobody_waits_for(watch))
    pretrain = config_of(model={"arch": "resnet10", "bn_group_size": BATCH // world.world_size})
    encoder, config = frozen(pretrain, dtype), FinetuneConfig(run_dir="r", global_batch_size=BATCH)
    network = finetune.Network(encoder.module, initial_classifier(encoder.dim, CLASSES, 0).to(DEVICE))
    network.requires_grad_(True)
    sgd = finetune._optimizer(network, config)
    engine = DDPEngine(network, sgd, dtype, EngineConfig(), world)
    training = Training(None, network, sgd, None, world)
    evaluation = evaluation_of(pretrain, world)
    told = SimpleNamespace(add=lambda note: None)
    finetune._epoch(engine, evaluation, config, encoder, BATCH, training, told, 0)
    assert training.step == IMAGES // BATCH
    finetune._average_statistics(network, world)


def test_the_detector_s_parts_stay_on_the_gpu(watch):
    """Backbone and heads; between them are boxes, whose number depends on values."""
    config = DetectConfig(weights="w.pth", arch="resnet10", data={"root": "d", "classes": ["cat", "dog"]})
    resnet = build_encoder(config_of().model, 0).backbone
    backbone = Backbone(resnet.state_dict(), config_of().model.model_copy(update={"arch": "resnet10"}), 0)
    detector = build_detector(backbone, config, AugmentConfig(), WORLDS[1])
    with watch.counting(may_wait=False) as count:
        trunk = detector.backbone(torch.empty(2, 3, 64, 96, device=DEVICE))
        regions = detector.roi_heads.box_head(torch.empty(5, trunk.shape[1], 14, 14, device=DEVICE))
        scores, boxes = detector.roi_heads.box_predictor(regions)
        objectness = detector.rpn.head([trunk])[0][0]
        (scores.sum() + boxes.sum() + objectness.sum()).backward()
    assert all(p.grad is None or p.grad.is_cuda for p in detector.parameters())
    assert count.flops > 0


def test_the_detector_s_gradients_are_averaged_without_waiting():
    with watching(8) as watch:
        module = torch.nn.Linear(3, 2).to(DEVICE)
        module(torch.empty(4, 3, device=DEVICE)).sum().backward()
        with watch.counting(may_wait=False) as count:
            loss = _share_gradients(module, torch.empty((), device=DEVICE), WORLDS[8])
    assert loss.shape == ()
    assert count.received_bytes["all-reduce"] > 0


@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_checkpoints_and_exports_leave_the_gpu(method, tmp_path, monkeypatch):
    """The share of rank 1,023, and the backbone that rank 0 writes."""
    config = config_of(method=method, moco={"queue_size": 8192}, optim={"global_batch_size": 8192})
    with watching(1024):
        built = build_method(config, WORLDS[1024])
        taken = checkpoint.snapshot(built, {"images": None, "pending_losses": []}, WORLDS[1024])
        assert taken.tensors
        for tensor in [*taken.tensors.values(), *taken.statistics.values()]:
            assert tensor.device.type == "cpu"
        assert ("queue" in taken.tensors) == (method == "moco")
    saved = {}
    monkeypatch.setattr(checkpoint.safetensors.torch, "save", lambda tensors, metadata: saved.update(tensors) or b"")
    with watching(1):
        checkpoint.export_backbone(build_method(config, WORLDS[1]), tmp_path / "b.safetensors", WORLDS[1])
    assert len(saved) > 50
    assert {tensor.device.type for tensor in saved.values()} == {"cpu"}


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_queue_is_filled_without_waiting(of_world, symmetric):
    watch, world = of_world
    batch = 8 * world.world_size
    config = config_of(moco={"queue_size": 512, "queue_start": "keys", "symmetric": symmetric},
                       optim={"global_batch_size": batch})  # fmt: skip
    method = build_method(config, world)
    views = torch.empty(8, 3, SIDE, SIDE, device=DEVICE)
    order = torch.empty(batch, dtype=torch.int64, device=DEVICE)
    with watch.counting(may_wait=False):
        method.fill_queue([Views(views, views, order)] * 2)
    assert int(method.queue.ptr) == 2 * batch * (2 if symmetric else 1)


# Mistakes, each made on purpose: in the linear classifiers' loss.
MISTAKES = {
    "an index left on the CPU": lambda losses, labels: losses[:, torch.arange(2)],
    "a value that is read": lambda losses, labels: losses * float(labels[0]),
    "a shape that depends on data": lambda losses, labels: losses[labels > 0].sum(0),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_step_is_found(watch, monkeypatch, mistake):
    losses_of = classifiers._losses
    monkeypatch.setattr(
        classifiers, "_losses", lambda logits, labels, out: mistake(losses_of(logits, labels, out)[None], labels)[0]
    )
    config = LinearConfig(run_dir="r", epochs=1, global_batch_size=BATCH)

    def feed(*_):
        with watch.counting(may_wait=False):
            yield torch.empty(BATCH, 16, device=DEVICE), np.arange(BATCH)

    with pytest.raises(HostWaitError, match=r"^moco_dist/evaluate/classifiers.py:\d+: "):
        train_classifiers(feed, np.arange(IMAGES) % CLASSES, features(8), None, CLASSES, config, WORLDS[1])
