"""Parts of training and testing with labels that no accuracy of a tiny run would notice."""

import numpy as np
import torch
from torch import nn

from moco_dist.config.evaluate import FinetuneConfig
from moco_dist.distributed.world import World
from moco_dist.evaluate.batches import global_batches
from moco_dist.evaluate.classifiers import per_class_accuracy, top_accuracies
from moco_dist.evaluate.detection.run import _flipped
from moco_dist.evaluate.detection.voc import Annotated
from moco_dist.evaluate.features import Features
from moco_dist.evaluate.finetune import Network, _optimizer


def test_every_epoch_has_an_order_of_its_own_and_each_image_once():
    first, second, again, other = (np.concatenate(global_batches(12, 4, *seed_epoch))
                                   for seed_epoch in ((0, 0), (0, 1), (0, 0), (1, 0)))  # fmt: skip
    assert sorted(first) == sorted(second) == list(range(12))
    assert (first == again).all()
    assert (first != second).any() and (first != other).any()


def features_of(scores, labels):
    return Features(torch.tensor(scores), torch.tensor(labels), torch.arange(len(labels)), len(labels))


def test_top_1_top_5_and_each_class():
    """Six classes, scored 6 to 1: class 0 is first, class 4 fifth and class 5 sixth."""
    scores = [[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]] * 4
    val = features_of(scores, [0, 4, 5, 5])
    assert top_accuracies(nn.Identity(), val, World()) == {"linear_top1": 25.0, "linear_top5": 50.0}
    by_class = per_class_accuracy(nn.Identity(), val, 6, World())
    assert [by_class[0], by_class[4], by_class[5]] == [100.0, 0.0, 0.0]
    assert np.isnan(by_class[1])


def test_the_new_layer_has_its_own_rate():
    config = FinetuneConfig.model_validate({"run_dir": "r", "backbone_lr": 0.01, "classifier_lr": 0.5})
    sgd = _optimizer(Network(nn.Linear(3, 2), nn.Linear(2, 2)), config)
    assert [group.get("lr_scale", 1) for group in sgd.param_groups] == [1, 50]


def test_a_mirrored_image_has_mirrored_boxes():
    pixels = torch.zeros(3, 20, 40, dtype=torch.uint8)
    pixels[:, 2:7, 3:11] = 255
    box = np.array([[3, 2, 11, 7]], dtype=np.float32)
    item = Annotated("x.jpg", 40, 20, box, np.array([1]), np.array([False]))  # type: ignore[arg-type]
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        (image,), (target,) = _flipped([(0, pixels)], [item], "cpu")
        left, top, right, bottom = target["boxes"][0].long().tolist()
        assert image[:, top:bottom, left:right].min() == 1
        assert image.sum() == image[:, top:bottom, left:right].sum()
        seen.add(left)
    assert seen == {3, 29}
