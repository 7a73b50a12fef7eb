"""Where a view is cut out: random-resized-crop boxes and flips, as a function of (seed, step, sample, view)."""

import math

import numpy as np
from numpy.typing import NDArray

from moco_dist.data import counter_rng

RATIO = (3 / 4, 4 / 3)
TRIES = 10  # as torchvision: then the largest central box of an allowed ratio
_PER_TRY = 4
_NUMBERS = _PER_TRY * TRIES + 1


def crop_draws(seed: int, step: int, samples: NDArray[np.int64], stream: int) -> NDArray[np.float64]:
    """(N, 41) uniform numbers that `crop_box` turns into a box and a flip once the image's size is known."""
    return counter_rng.uniforms(seed, step, samples, stream, _NUMBERS)


def crop_box(
    draws: NDArray[np.float64], width: int, height: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The rule of torchvision's RandomResizedCrop, on one row of `crop_draws`.

    A share of the area from U(scale) and an aspect ratio log-uniform in (3/4, 4/3), tried ten times until the box
    fits, then placed uniformly.

    Args:
        draws: (41,) uniform numbers.
        width: of the image, in pixels.
        height: of the image, in pixels.
        scale: smallest and largest share of the area.

    Returns:
        left, top, right, bottom in pixels; at least one pixel wide and high, within the image.
    """
    low, high = (math.log(r) for r in RATIO)
    for i in range(0, _PER_TRY * TRIES, _PER_TRY):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[i])
        ratio = math.exp(low + (high - low) * draws[i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[i + 2] * (width - w + 1)), int(draws[i + 3] * (height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    w = min(width, max(1, round(height * ratio)))
    h = min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def smallest_side(width: int, height: int, scale: tuple[float, float]) -> float:
    """The shortest side, in pixels, that a box of `crop_box` may have before it is rounded to whole pixels."""
    return min(width, height, math.sqrt(RATIO[0] * scale[0] * width * height))


def is_flipped(draws: NDArray[np.float64], probability: float) -> bool:
    """Whether the view of this row of `crop_draws` is mirrored."""
    return bool(draws[-1] < probability)


def centre_resize(width: int, height: int, resize: int, crop: int) -> tuple[int, int]:
    """(height, width) to resize an image to ahead of its centre crop, as torchvision's Resize(resize) has it.

    A crop that is larger than `resize` has the short side become `crop`.
    """
    short = max(resize, crop)
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)
