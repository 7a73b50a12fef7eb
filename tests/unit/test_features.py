"""Features as classifiers take them."""

import pytest
import torch

from moco_dist.distributed.world import World
from moco_dist.evaluate.features import Features, standardise


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
