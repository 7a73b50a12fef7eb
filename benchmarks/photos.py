"""JPEGs of about 500 x 375 to load: cut out of photographs, or, where there are none, out of generated pictures.

Photographs: Debian's gnome-backgrounds and mate-backgrounds. Generated pictures are noise whose amplitude falls with
the frequency, as that of photographs does, so steeply that the JPEGs have about as many bytes (57 and 55 kB).
"""

import statistics
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
BACKGROUNDS = Path("/usr/share/backgrounds")
GENERATED, STEEPNESS = 4, 1.6  # pictures of noise, and the power of 1 / frequency of their amplitude


def source_of_photos() -> str:
    """What `make_photos` cuts images out of: a fact of each result."""
    return "photographs" if _photographs() else "generated pictures"


def make_photos(root: Path, count: int) -> float:
    """`count` JPEGs of WIDTH x HEIGHT, into ROOT/train; their mean size in bytes."""
    sources: list[Path] | list[int] = _photographs() or list(range(GENERATED))
    (root / "train" / "photos").mkdir(parents=True)
    rng, made, sizes = np.random.default_rng(0), 0, []
    for number, source in enumerate(sources):
        image = noise(source) if isinstance(source, int) else Image.open(source).convert("RGB")
        while made < count * (number + 1) // len(sources):
            width = int(min(image.width, image.height * WIDTH / HEIGHT) * rng.uniform(0.2, 1.0))
            height = width * HEIGHT // WIDTH
            left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
            path = root / "train" / "photos" / f"{made:05d}.jpg"
            box = (int(left), int(top), int(left) + width, int(top) + height)
            image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box).save(path, quality=95)
            sizes.append(path.stat().st_size)
            made += 1
    return statistics.mean(sizes)


def _photographs() -> list[Path]:
    return sorted(path for kind in ("*.jpg", "*.webp") for path in BACKGROUNDS.rglob(kind))


def noise(seed: int) -> Image.Image:
    """A picture of 1500 x 1125, most of its colours common to the three channels."""
    rng, shape = np.random.default_rng(seed), (1125, 1500)
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    frequency[0, 0] = np.inf  # no mean
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) / frequency**STEEPNESS, s=shape) for _ in range(4)]
    common, *own = (plane / plane.std() for plane in planes)
    pixels = 128 + 50 * np.stack([common + 0.3 * plane for plane in own], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
