"""The crops of training with labels: a function of (seed, epoch, sample), half of them mirrored."""

import numpy as np

from moco_dist.evaluate import batches


def test_crops_are_new_in_every_epoch_and_half_are_mirrored(monkeypatch):
    monkeypatch.setattr(batches, "row_task", lambda rows, crop: [crop(i, 100, 80) for i in range(len(rows))])

    def crops(seed, epoch):
        return batches.random_crops(0, own=[np.arange(400)], scale=(0.08, 1.0), seed=seed, epoch=epoch)

    first = [repr(crop) for crop in crops(0, 0)]
    assert first == [repr(crop) for crop in crops(0, 0)]
    for other in (crops(0, 1), crops(1, 0)):
        assert sum(a == repr(b) for a, b in zip(first, other, strict=True)) < 10
    mirrored = sum(bool(crop[1]) for crop in crops(0, 0))
    assert 150 < mirrored < 250
