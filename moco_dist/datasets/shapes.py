"""A generated data set: ten shapes, and everything else in the picture is noise.

Each image shows some copies of one shape, and the shape is its class. Place, size, rotation, aspect, colour and
texture of every copy, and the background, are drawn independently of the class. So pixels and colours say
little about the class, while two crops of one image have hardly anything but the shape in common, which
contrastive learning can find.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]
Pixels = NDArray[np.floating]

SUPERSAMPLING = 3  # masks are drawn this much larger, for smooth edges
PLACING_TRIES = 20


@dataclass(frozen=True)
class ShapeSettings:
    """What the images look like, and so how hard they are.

    Attributes:
        image_size: side of the images, in pixels.
        copies: fewest and most copies of the shape (fewer where there is no room left).
        diameter: smallest and largest diameter of a copy, as a share of the image's side.
        stretch: largest change of a copy's aspect ratio: 0.2 is up to 20 % longer in one direction.
        min_contrast: least difference in brightness, in [0, 1], between a copy and what is behind it.
        tint: spread of the background's colour around gray, in [0, 1].
        clutter: spread of colours within a background and within a copy, in [0, 1].
        noise: standard deviation of every pixel's noise, in [0, 1].
        jpeg_quality: of the files.
    """

    image_size: int = 64
    copies: tuple[int, int] = (5, 8)
    diameter: tuple[float, float] = (0.22, 0.3)
    stretch: float = 0.2
    min_contrast: float = 0.25
    tint: float = 0.1
    clutter: float = 0.02
    noise: float = 0.06
    jpeg_quality: int = 90


def draw_image(label: int, rng: np.random.Generator, settings: ShapeSettings) -> Image.Image:
    """One square RGB image of class `label`, an index into `SHAPES`: a function of the generator's state alone."""
    size = settings.image_size
    pixels = _clouds(size, 0.5 + settings.tint * rng.uniform(-0.5, 0.5, 3), rng, settings.clutter)
    # Copies in one image are alike in character too: how many points a star has, how thick a ring is.
    outlines = list(SHAPES.values())[label](*rng.random(2))
    for diameter, centre in _places(rng, settings):
        pose = _pose(diameter, rng, settings.stretch)
        mask = _mask([outline @ pose + centre for outline in outlines], size)[:, :, None]
        behind = float((pixels * mask).sum() / (3 * mask.sum()))
        fill = _clouds(size, _colour_apart_from(behind, rng, settings), rng, settings.clutter)
        pixels += mask * (fill - pixels)
    pixels += settings.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray((pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def _clouds(size: int, colour: Points, rng: np.random.Generator, clutter: float) -> Pixels:
    """(size, size, 3) in [0, 1]: smooth variations around a colour, coarse or fine."""
    cells = int(rng.integers(3, 9))
    grid = rng.normal(colour, clutter, (cells, cells, 3)).clip(0, 1)
    small = Image.fromarray((grid * 255).astype(np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _colour_apart_from(brightness: float, rng: np.random.Generator, settings: ShapeSettings) -> Points:
    """(3,) a colour whose mean differs from `brightness` by `min_contrast` at least."""
    while True:
        colour = np.clip(rng.uniform(0, 1) + rng.uniform(-0.5, 0.5, 3), 0, 1)
        if abs(colour.mean() - brightness) > settings.min_contrast:
            return colour


def _places(rng: np.random.Generator, settings: ShapeSettings) -> list[tuple[float, Points]]:
    """Diameters and centres, in pixels, of copies that do not touch."""
    size = settings.image_size
    placed: list[tuple[float, Points]] = []
    for _ in range(rng.integers(*settings.copies, endpoint=True)):
        diameter = size * rng.uniform(*settings.diameter)
        for _ in range(PLACING_TRIES):
            centre = rng.uniform(diameter / 2, size - diameter / 2, 2)
            if all(np.hypot(*(centre - other)) > (diameter + d) / 2 for d, other in placed):
                placed.append((diameter, centre))
                break
    return placed


def _pose(diameter: float, rng: np.random.Generator, stretch: float) -> Points:
    """(2, 2) matrix: stretch along a random direction, turn, mirror or not, and scale."""
    a, b = rng.uniform(0, 2 * math.pi, 2)
    ratio = math.sqrt(1 + stretch * rng.random())
    mirror = rng.choice([-1.0, 1.0])
    return _turn(a) @ np.diag([ratio, mirror / ratio]) @ _turn(b) * (diameter / 2)


def _turn(angle: float) -> Points:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _mask(outlines: list[Points], size: int) -> Pixels:
    """(size, size) in [0, 1]: the first outline filled, a second one cut out of it."""
    image = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for outline, fill in zip(outlines, (255, 0), strict=False):
        draw.polygon((outline * SUPERSAMPLING).ravel().tolist(), fill=fill)
    return np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / 255


# The shapes: outlines around the origin, at most about 1 from it. u and v in [0, 1) vary their proportions.


def _polar(radii: Points | list[float]) -> Points:
    """A closed outline through equally spaced angles."""
    angles = np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _circle(u: float, v: float) -> list[Points]:
    return [_polar(np.ones(48))]


def _ring(u: float, v: float) -> list[Points]:
    return [_polar(np.ones(48)), _polar(np.full(48, 0.45 + 0.25 * u))]


def _triangle(u: float, v: float) -> list[Points]:
    return [_polar([1.0, 0.8 + 0.2 * u, 0.8 + 0.2 * v])]


def _square(u: float, v: float) -> list[Points]:
    return [_polar(np.ones(4)) * [1.0, 0.85 + 0.15 * u]]


def _star(u: float, v: float) -> list[Points]:
    return [_polar(np.tile([1.0, 0.3 + 0.15 * v], 4 + int(3 * u)))]


def _cross(u: float, v: float) -> list[Points]:
    w, b = 0.18 + 0.14 * u, 0.85 + 0.1 * v
    quarter = np.array([[w, w], [w, b], [-w, b]])
    return [np.concatenate([quarter @ _turn(-i * math.pi / 2) for i in range(4)])]


def _crescent(u: float, v: float) -> list[Points]:
    opening, hollow = 0.6 + 0.4 * u, 0.4 + 0.3 * v
    angles = np.linspace(opening, 2 * math.pi - opening, 32)
    outer = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    tip = math.cos(opening)
    inner = np.stack([tip - hollow * (tip - outer[::-1, 0]), outer[::-1, 1]], axis=1)
    return [np.concatenate([outer, inner])]


def _heart(u: float, v: float) -> list[Points]:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - (4 + 2 * u) * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([x, y], axis=1) / 17]


def _arrow(u: float, v: float) -> list[Points]:
    shaft, neck, head = 0.14 + 0.1 * u, 0.1 + 0.25 * v, 0.7
    upper = np.array([[-0.95, shaft], [neck, shaft], [neck, head], [1.0, 0.0]])
    return [np.concatenate([upper, upper[2::-1] * [1, -1]])]


def _gear(u: float, v: float) -> list[Points]:
    depth = 0.6 + 0.1 * v
    return [_polar(np.tile([1.0, 1.0, depth, depth], 6 + int(3 * u)))]


SHAPES: dict[str, Callable[[float, float], list[Points]]] = {
    "arrow": _arrow,
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "gear": _gear,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
