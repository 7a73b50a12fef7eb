"""Features as classifiers take them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moco_dist.config.evaluate import EvalDataConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.images import ImageFolder
from moco_dist.data.names import Names
from moco_dist.distributed.world import World
from moco_dist.evaluate import subject
from moco_dist.evaluate.features import Features, _key, standardise
from moco_dist.evaluate.subject import FrozenEncoder
from moco_dist.method.batch_norm import GroupedBatchNorm2d


@pytest.mark.parametrize("dim", [4, 64])
def test_standardised_features_have_the_squared_length_1_on_average_whatever_their_size(dim):
    """So one learning rate serves. `val` is shifted and scaled by the numbers of `train`."""
    generator = torch.Generator().manual_seed(0)
    raw = 3 + 5 * torch.randn(200, dim, generator=generator)
    raw[:, 0] = 7.0  # which never changes
    labels, rows = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    train, val = Features(raw.clone(), labels, rows, 200), Features(2 * raw, labels, rows, 200)
    standardise(train, val, World())
    assert train.values[:, 0].abs().max() == 0
    torch.testing.assert_close(train.values.mean(0), torch.zeros(dim), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.values.square().mean(0)[1:], torch.full((dim - 1,), 1 / dim))
    assert train.values.square().sum(1).mean().item() == pytest.approx((dim - 1) / dim)
    std = raw.std(0, correction=0)
    expected = (2 * raw - raw.mean(0)) / (std * dim**0.5)
    torch.testing.assert_close(val.values[:, 1:], expected[:, 1:])


def test_the_untrained_network_s_statistics_are_the_mean_over_all_groups(monkeypatch):
    """None weighs more than another; images are darker from group to group, so that it would show."""
    pretrain = PretrainConfig.model_validate({
        "run": {"dir": "r"}, "data": {"root": "d"}, "model": {"bn_group_size": 128},
        "optim": {"global_batch_size": 256}, "augment": {"mean": [0, 0, 0], "std": [1, 1, 1]},
    })  # fmt: skip
    groups = [torch.randint(0, 255 // (i + 1), (128, 3, 4, 4), dtype=torch.uint8) for i in range(4)]
    asked = []

    def batches(folder, samples, *_):
        asked.extend(samples.tolist())
        yield from ((views, None) for views in groups)

    monkeypatch.setattr(subject, "eval_batches", batches)
    norm = GroupedBatchNorm2d(3, group_size=128)
    evaluation = SimpleNamespace(
        world=World(), pretrain=pretrain, train=SimpleNamespace(paths=range(400)), resize=4, crop=4,
        config=SimpleNamespace(data=EvalDataConfig()),
    )  # fmt: skip
    subject._calibrate(FrozenEncoder("untrained", 0, norm, 3, pretrain, torch.float32, "cpu"), evaluation)
    assert len(asked) == 512 and set(asked) == set(range(400)) and asked[:400] != list(range(400))
    of_groups = torch.stack(groups) / 255
    torch.testing.assert_close(norm.running_mean, of_groups.mean((0, 1, 3, 4)))
    torch.testing.assert_close(norm.running_var, of_groups.var((1, 3, 4)).mean(0), rtol=1e-4, atol=1e-6)
    assert not norm.training


def test_features_that_are_kept_are_of_these_images_and_this_network_alone():
    """Of another list of as many images, say, none is read."""
    pretrain = PretrainConfig.model_validate({"run": {"dir": "r"}, "data": {"root": "d"}})

    def key(root="d", names=("a/1.jpg", "a/2.jpg"), split="train", crop=32, loader="torchvision", weight=1.0):
        module = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(module.weight, weight)
        torch.nn.init.zeros_(module.bias)
        encoder = FrozenEncoder("trained", 0, module, 1, pretrain, torch.float32, "cpu")
        config = SimpleNamespace(data=EvalDataConfig(loader=loader))
        evaluation = SimpleNamespace(pretrain=pretrain, config=config, resize=36, crop=crop)
        return _key(evaluation, encoder, split, ImageFolder(Path(root), Names.of(names), np.zeros(2, np.int64), ("a",)))

    others = [key(root="e"), key(names=("a/1.jpg", "a/3.jpg")), key(split="val"), key(crop=31), key(loader="ffcv"),
              key(weight=2.0)]  # fmt: skip
    assert key() == key()
    assert len({key(), *others}) == 1 + len(others)
