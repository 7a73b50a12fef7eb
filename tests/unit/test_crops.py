"""Boxes against torchvision's RandomResizedCrop, and the corners of its rule."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop, Resize

from moco_dist.data.crops import centre_resize, crop_box, crop_draws, is_flipped, smallest_side


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), sample=st.integers(0, 2**31), low=st.floats(0.01, 1.0))
def test_boxes_are_inside(width, height, sample, low):
    draws = crop_draws(0, 0, np.array([sample]), 0)[0]
    left, top, right, bottom = crop_box(draws, width, height, (low, 1.0))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert min(right - left, bottom - top) >= smallest_side(width, height, (low, 1.0)) - 0.5


def test_distribution_is_torchvisions():
    """Mean, standard deviation and correlations of the edges over 20,000 boxes, against torchvision's own draws."""
    width, height, n = 500, 375, 20_000
    ours = np.array([crop_box(d, width, height, (0.2, 1.0)) for d in crop_draws(3, 7, np.arange(n), 0)], dtype=float)
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = []
    for _ in range(n):
        top, left, h, w = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
        theirs.append((left, top, left + w, top + h))
    theirs = np.array(theirs, dtype=float)
    standard_error = theirs.std(0) / n**0.5
    assert (abs(ours.mean(0) - theirs.mean(0)) < 5 * standard_error).all()
    assert (abs(ours.std(0) / theirs.std(0) - 1) < 0.03).all()
    assert abs(np.corrcoef(ours.T) - np.corrcoef(theirs.T)).max() < 6 / n**0.5


def test_a_box_reaches_every_border_alike():
    """On 12 x 9 pixels a position that is never taken would be a good part of all."""
    boxes = np.array([crop_box(d, 12, 9, (0.2, 1.0)) for d in crop_draws(0, 0, np.arange(4000), 0)], dtype=float)
    before, after = boxes[:, :2], np.array([12, 9]) - boxes[:, 2:]
    difference = before - after
    assert (abs(difference.mean(0)) < 5 * difference.std(0) / len(boxes) ** 0.5).all()


def test_an_image_too_narrow_for_any_ratio_gives_its_central_part():
    draws = crop_draws(0, 0, np.array([5]), 0)[0]
    assert crop_box(draws, 1000, 10, (0.9, 1.0)) == (493, 0, 506, 10)
    assert crop_box(draws, 1, 1, (0.2, 1.0)) == (0, 0, 1, 1)


def test_half_of_the_views_are_flipped():
    flips = [is_flipped(draws, 0.5) for draws in crop_draws(0, 1, np.arange(4000), 1)]
    assert 0.47 < np.mean(flips) < 0.53
    assert not any(is_flipped(draws, 0.0) for draws in crop_draws(0, 1, np.arange(100), 1))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (300, 300), (1023, 77), (31, 400)])
def test_centre_resize_is_torchvisions(width, height):
    assert centre_resize(width, height, 256, 224) == Resize(256)(Image.new("RGB", (width, height))).size[::-1]


def test_a_crop_larger_than_the_resize_has_the_short_side_fill_it():
    assert centre_resize(64, 128, 32, 48) == (96, 48)
