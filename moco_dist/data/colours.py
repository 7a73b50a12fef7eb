"""The colours of a view: jitter, grayscale, blur and normalisation, batched on the device (the design's idea V).

Loaders crop and flip; the rest of MoCo's augmentation (v1 sec. 3.3) and of MoCo v2's aug+ (v2 sec. 3) is here, once
for all loaders. The host draws every sample's parameters, so they do not depend on who decodes or how batches are
made up. Each operation is torchvision's on float images: differences are rounding, far below one level in 255.

The operations are batched along one schedule. Brightness, contrast, saturation and grayscale are all a step
towards, or away from, some other image (black, the mean gray, the gray image), so one function does the four of them;
hue is the odd one out. With three steps before the hue and three after it, of which a sample takes those that its
random order asks for, all samples meet at one hue.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.config.pretrain import AugmentConfig
from moco_dist.data import counter_rng

# A further operation: its setting in AugmentConfig, a column at the end of these, its value in `draw_colours` (of
# further uniforms, which leave the first ones as they are), its pixels in `_apply`. Nothing else knows them.
COLOUR_COLUMNS = (
    "brightness", "contrast", "saturation", "hue",  # factors; 1, 1, 1 and 0 change nothing
    "order_0", "order_1", "order_2", "order_3",  # which of the four above comes first, second, ...
    "grayscale",  # 0 or 1
    "blur_sigma",  # pixels; 0 is no blur
)  # fmt: skip
_CONTRAST, _SATURATION, _HUE = 1, 2, 3
_GRAYSCALE, _BLUR_SIGMA = COLOUR_COLUMNS.index("grayscale"), COLOUR_COLUMNS.index("blur_sigma")
_IDENTITY = np.array([1.0, 1.0, 1.0, 0.0])
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision writes it

# On a CPU, samples are worked on a few at a time, so that they stay in the core's cache from one operation to the
# next, and the blur multiplies blocks of rows, since its matrices are zero away from the diagonal.
_CHUNK_VALUES = 2**18
_BLUR_BLOCK = 32


def draw_colours(config: AugmentConfig, seed: int, step: int, samples: NDArray[np.int64], stream: int) -> Tensor:
    """The photometric parameters of each sample's view.

    Their distributions: torchvision's ColorJitter (factors U(max(0, 1 - s), 1 + s), hue U(-s, s), the four in random
    order) applied with `config.jitter_probability`, RandomGrayscale, and a blur of sigma U(config.blur_sigma)
    applied with `config.blur_probability`.

    Args:
        config: strengths and probabilities.
        seed: the run's.
        step: optimiser step.
        samples: (N,) indices into the data set.
        stream: counter_rng.STREAM_COLOUR_Q or STREAM_COLOUR_K.

    Returns:
        (N, P) float32, columns as in COLOUR_COLUMNS. A row depends on nothing but (seed, step, sample, stream).
    """
    u = counter_rng.uniforms(seed, step, samples, stream, 12)
    strength = np.array(config.jitter)
    low, high = np.maximum(_IDENTITY - strength, [0, 0, 0, -0.5]), _IDENTITY + strength
    factors = np.where(u[:, :1] < config.jitter_probability, low + (high - low) * u[:, 1:5], _IDENTITY)
    order = u[:, 5:9].argsort(axis=1, kind="stable")
    grayscale = u[:, 9:10] < config.grayscale_probability
    low, high = config.blur_sigma
    blur_sigma = np.where(u[:, 10:11] < config.blur_probability, low + (high - low) * u[:, 11:12], 0)
    return torch.from_numpy(np.hstack([factors, order, grayscale, blur_sigma]).astype(np.float32))


def apply_colours(views: Tensor, colours: Tensor, config: AugmentConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Colour jitter, grayscale, blur and normalisation, in this order.

    The blur is a Gaussian cut off at ceil(3 x the largest sigma) pixels, or at S - 1 where the image is smaller than
    that, and reflected at the border: torchvision's gaussian_blur. PIL's GaussianBlur(radius=sigma), which the
    original MoCo v2 used, approximates it by three box blurs and repeats the border pixel instead. On images with the
    1/f spectrum of photographs the two differ by 0.5 levels of 255 on average for sigma from 1 to 2, where the blur
    itself changes 15 to 20; by 1.0 at 0.6, and by at most 2.3, around 0.3, where PIL blurs more.

    Args:
        views: uint8 (N, 3, S, S), RGB.
        colours: float32 (N, P), from `draw_colours` under the same config; on any device.
        config: blur, mean and std.
        dtype: of the result. The arithmetic is float32, or float64 where that is asked for.

    Returns:
        (N, 3, S, S) of `dtype`, channels-last, on the device of `views`.
    """
    return _apply(views, colours, config, dtype, skip=not views.is_cuda)


def _apply(views: Tensor, colours: Tensor, config: AugmentConfig, dtype: torch.dtype, skip: bool) -> Tensor:
    """`apply_colours`, leaving out what a sample does not need (`skip`), or computing everything for all of them.

    To leave work out, the host has to know for which samples, and would have to wait for a GPU to tell it. On a GPU
    a sample that needs nothing is therefore blended by 0, turned by 0 or multiplied by the identity.
    """
    size = views.shape[-1]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    colours = colours.to(views.device, compute, non_blocking=True)
    blur = functools.partial(
        _blur,
        radius=min(math.ceil(3 * config.blur_sigma[1]), size - 1),
        block=_BLUR_BLOCK if skip else size,
    )
    out = torch.empty(views.shape, dtype=dtype, device=views.device, memory_format=torch.channels_last)
    chunk = max(1, torch.get_num_threads() * _CHUNK_VALUES // views[0].numel()) if skip else len(views)
    parts = (tensor.split(chunk) for tensor in (views, out, colours, _blends(colours)))
    with torch.autocast(views.device.type, enabled=False):
        for x, x_out, values, blends in zip(*parts, strict=True):
            # Channels first until the end: whole planes of one channel are what a CPU computes fastest on.
            x = x.to(compute, memory_format=torch.contiguous_format).mul_(1 / 255)
            for i, blend in enumerate(blends.unbind(1)):
                if i == 3 and config.jitter[3]:
                    x = _on(x, _shift_hue, values[:, _HUE], skip)
                x = _on(x, _blend, blend, skip)
            if config.blur_probability:
                x = _on(x, blur, values[:, _BLUR_SIGMA], skip)
            for channel, mean, std in zip(x.unbind(1), config.mean, config.std, strict=True):
                channel.sub_(mean).div_(std)
            x_out.copy_(x.to(dtype))
    return out


def _blends(colours: Tensor) -> Tensor:
    """The seven blends of each sample: three before the hue, three after it, and grayscale.

    Returns:
        (N, 7, 3): how much of the other image (0: nothing to do); whether it is the mean gray (contrast); whether it
        is the gray image (saturation, grayscale). Where neither, it is black (brightness).
    """
    order = colours[:, 4:8].long()
    amounts = 1 - colours[:, :4].gather(1, order)
    position = torch.arange(4, device=colours.device)
    hue_position = (order == _HUE).long().argmax(1, keepdim=True)
    before = torch.where(position < hue_position, amounts, 0)[:, :3]
    after = torch.where(position > hue_position, amounts, 0)[:, 1:]
    amounts = torch.cat([before, after, colours[:, _GRAYSCALE, None]], dim=1)
    operation = torch.cat([order[:, :3], order[:, 1:], torch.full_like(order[:, :1], _SATURATION)], dim=1)
    return torch.stack([amounts, operation == _CONTRAST, operation == _SATURATION], dim=2)


def _on(x: Tensor, operation: Callable[[Tensor, Tensor], Tensor], values: Tensor, skip: bool) -> Tensor:
    """`operation(x, values)`, which leaves a sample as it is where its (first) value is 0; may overwrite x."""
    if not skip:
        return operation(x, values)
    rows = values.reshape(len(x), -1)[:, 0].nonzero()[:, 0]
    if len(rows) == len(x):
        return operation(x, values)
    if len(rows):  # x[rows] would copy value by value
        x.index_copy_(0, rows, operation(x.index_select(0, rows), values.index_select(0, rows)))
    return x


def _blend(x: Tensor, blend: Tensor) -> Tensor:
    """(1 - amount) x image + amount x other: black, the mean gray or the gray image (see `_blends`)."""
    amount, to_mean, to_gray = blend[:, :, None, None, None].unbind(1)
    r, g, b = x.split(1, dim=1)
    gray = (r * _LUMA[0]).add_(g, alpha=_LUMA[1]).add_(b, alpha=_LUMA[2])
    mean = gray.mean((1, 2, 3), keepdim=True)
    return torch.lerp(x, gray.mul_(to_gray).add_(mean * to_mean), amount).clamp_(0, 1)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """HSV's hue, turned by `shift` circles, without going through S and V.

    A turn leaves a pixel's largest and smallest channel values alone and moves each channel between the two, on a
    trapezoid over the circle. The distance of a hue from red, in circles, is (chroma + g + b - r - min) / 6 chroma
    in every sector (where red is the largest, the smallest or in between), and it lies on green's side if g > b.
    """
    r, g, b = x.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    chroma6 = chroma * 6
    hue = (g + b).sub_(r).add_(high).sub_(low, alpha=2).div_(chroma6.clamp_min(torch.finfo(x.dtype).tiny))
    hue = hue.copysign_(g - b).add_(1 + shift[:, None, None]).frac_()
    # The trapezoids, centred on cyan, green and blue.
    turned = torch.empty_like(x)
    ends = (low - chroma, 1 / 2, 1), (high + chroma, 1 / 3, -1), (high + chroma, 2 / 3, -1)
    for channel, (end, centre, sign) in zip(turned.unbind(1), ends, strict=True):
        channel.copy_(end).addcmul_(chroma6, (hue - centre).abs_().clamp_(1 / 6, 1 / 3), value=sign)
    return turned


def _blur(x: Tensor, sigma: Tensor, radius: int, block: int) -> Tensor:
    """Gaussian blur as a product with one S x S matrix a sample from the left, and its transpose from the right.

    Args:
        x: (n, 3, S, S).
        sigma: (n,) in pixels; 0 is no blur.
        radius: where the Gaussian is cut off, in pixels.
        block: rows of the matrix multiplied at once, by only those columns that are not zero in them.
    """
    size = x.shape[-1]
    distance = torch.arange(radius + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)[:, None]) ** 2)
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    matrix = (weights @ _neighbours(size, radius, x.dtype, x.device)).view(-1, 1, size, size)
    bands = [(slice(i, i + block), slice(max(0, i - radius), i + block + radius)) for i in range(0, size, block)]
    x = torch.cat([matrix[:, :, rows, near] @ x[:, :, near] for rows, near in bands], dim=2)
    return torch.cat([x[..., near] @ matrix[:, :, rows, near].mT for rows, near in bands], dim=3)


def _neighbours(size: int, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _make_neighbours(size, radius, dtype, device)


# A compiler looks through a cache, and would make it anew at every step. This is what
# torch.compiler.assume_constant_result sets; calling that imports the compiler, for seconds, in every process.
_neighbours._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4)
def _make_neighbours(size: int, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(radius + 1, size²): row d, as a matrix, adds up the pixels at distance d, reflected at the border."""
    neighbours = torch.zeros(radius + 1, size, size, dtype=dtype)
    here = torch.arange(size)
    for offset in range(-radius, radius + 1):
        there = (size - 1) - ((size - 1) - (here + offset).abs()).abs()
        neighbours[abs(offset), here, there] += 1
    return neighbours.flatten(1).to(device)
