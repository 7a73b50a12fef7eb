"""From an image's bytes to its views, on the host.

libjpeg-turbo (by simplejpeg) decodes into memory that is kept, which is twice as fast as PIL and equal to it, bit for
bit; what it does not take (other formats, CMYK, damaged files) PIL decodes, or names the reason. Resizing is torch's
for uint8, three to five times as fast as PIL's, and rarely more than one level of 255 from it.

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where even the smallest crop that a run may take of it is at least as
many times as large as its view. The scale is thus a function of the image's size and the run's settings: a view is the
same whoever decodes it, alone or beside the sample's other view. On photographs this changes views by 0.4 levels of 255
on average and 25 at most, and 3000 x 2250 pixels take 60 % of the time. (Each view at its own crop's scale would have
two scales for 45 % of such pairs, and so two decodes: 30 % more time.)
"""

import io
import math
import threading
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moco_dist.data.images import ImageError
from moco_dist.data.tasks import Crop

CropsFor = Callable[[int, int], list[Crop]]  # of (width, height)

warnings.filterwarnings("ignore", module="PIL")  # of odd files that PIL reads all the same

MOST_OBLONG = 32  # times as long as wide: of a longer image only the part that a view needs is resized

_scratch = threading.local()


def cut(data: bytes | memoryview, name: str, size: int, crops_for: CropsFor) -> list[Tensor]:
    """The views of an image.

    Args:
        data: the file's content.
        name: the file's, for errors.
        size: S, side of a view.
        crops_for: the crops, once width and height are known.

    Returns:
        uint8 (3, S, S) for each crop, channels-last.

    Raises:
        ImageError: it cannot be decoded.
    """
    try:
        header = simplejpeg.decode_jpeg_header(data)
        height, width, colours = int(header[0]), int(header[1]), header[2]
        if colours in ("YCbCr", "Gray") and width * height <= 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            return _cut_jpeg(data, width, height, size, crops_for(width, height))
    except ValueError:  # no JPEG, or a damaged one: PIL knows, and says why
        pass
    pixels = np.array(decode_image(data, name))
    return cut_pixels(pixels, size, crops_for(pixels.shape[1], pixels.shape[0]))


def cut_pixels(pixels: NDArray[np.uint8], size: int, crops: list[Crop], factor: int = 1) -> list[Tensor]:
    """The views of an image that is already decoded, (H, W, 3), at 1/`factor` of the size that the boxes are of."""
    views = []
    for crop in crops:
        target = crop.resized or (size, size)
        top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
        if factor == 1 and not is_oblong(crop):
            x0, y0, x1, y1 = crop.box
            view = F.interpolate(_channels_last(pixels[y0:y1, x0:x1]), target, mode="bilinear", antialias=True)
        else:  # boxes between pixels are PIL's
            x0, y0, x1, y1 = (edge / factor for edge in crop.box)
            if is_oblong(crop):  # only what the view needs
                x, y = (x1 - x0) / target[1], (y1 - y0) / target[0]
                x0, x1 = x0 + left * x, min(x1, x0 + (left + size) * x)
                y0, y1 = y0 + top * y, min(y1, y0 + (top + size) * y)
                target, top, left = (size, size), 0, 0
            resized = Image.fromarray(pixels).resize(
                (target[1], target[0]), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)
            )
            view = torch.from_numpy(np.array(resized))[None].permute(0, 3, 1, 2)
        if target != (size, size):
            view = view[..., top : top + size, left : left + size]
        views.append((view.flip(-1) if crop.flip else view)[0])
    return views


def is_oblong(crop: Crop) -> bool:
    """Whether the image would be resized to a stripe that takes too much memory: 20,000 x 1 pixels would take 4 GB."""
    return crop.resized is not None and max(crop.resized) > MOST_OBLONG * min(crop.resized)


def decode_image(data: bytes | memoryview, name: str) -> Image.Image:
    """An image as RGB, converted as torchvision's default loader does, but for pixels of 16 bits.

    PIL cuts those off at 255, so that all but the darkest become white; here the upper 8 bits are taken.

    Args:
        data: the file's content.
        name: the file's, for the error.

    Raises:
        ImageError: it is empty, truncated, damaged, of 32-bit pixels (their range is not known), or larger than PIL's
            limit (an attack's sign).
    """
    try:
        if not data:
            raise ValueError("the file is empty")
        image = Image.open(io.BytesIO(data))
        if image.mode in ("I", "F"):
            raise ValueError("its pixels are 32-bit numbers of unknown range; save it with 8 or 16 bits")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"cannot read image {name}: not an image") from error
    except Exception as error:  # on damaged files PIL's decoders raise anything from OSError to struct.error
        raise ImageError(f"cannot read image {name}: {str(error) or type(error).__name__}") from error


def _cut_jpeg(data: bytes | memoryview, width: int, height: int, size: int, crops: list[Crop]) -> list[Tensor]:
    """The views. Each is cut from the image as decoded for it alone; views of one scale share a decode."""
    factors = [_reduction(crop, size) for crop in crops]
    made: dict[int, Tensor] = {}
    for factor in set(factors):
        rows = [row for row, own in enumerate(factors) if own == factor]
        pixels = _decode_jpeg(data, width, height, factor)
        made |= dict(zip(rows, cut_pixels(pixels, size, [crops[row] for row in rows], factor), strict=True))
    return [made[row] for row in range(len(crops))]


def _decode_jpeg(data: bytes | memoryview, width: int, height: int, factor: int) -> NDArray[np.uint8]:
    """(H, W, 3) in memory that the next call overwrites."""
    rows, columns = -(-height // factor), -(-width // factor)
    return simplejpeg.decode_jpeg(
        data,
        "RGB",
        fastdct=False,
        fastupsample=False,
        min_height=rows,
        min_width=columns,
        min_factor=factor,
        buffer=_kept_memory("image", rows * columns * 3),
    )


def _channels_last(box: NDArray[np.uint8]) -> Tensor:
    """(1, 3, h, w) of a part of an image, (h, w, 3), without gaps between its rows; the next call may overwrite it.

    torch rearranges every other layout before and after resizing, which takes nearly as long as resizing itself.
    """
    if not box.flags.c_contiguous:
        kept = _kept_memory("box", box.size)[: box.size].reshape(box.shape)
        kept[...] = box
        box = kept
    return torch.from_numpy(box)[None].permute(0, 3, 1, 2)


def _kept_memory(use: str, size: int) -> NDArray[np.uint8]:
    """`size` bytes or more of this thread's, for `use`: new pages would cost as much as decoding."""
    memory = getattr(_scratch, use, None)
    if memory is None or len(memory) < size:
        memory = np.empty(size, np.uint8)
        setattr(_scratch, use, memory)
    return memory


def _reduction(crop: Crop, size: int) -> int:
    """1, 2, 4 or 8: how much smaller the image may be decoded, so that the crop need not be enlarged."""
    height, width = crop.resized or (size, size)
    left, top, right, bottom = crop.box
    room = crop.smallest / size if crop.smallest else min((bottom - top) / height, (right - left) / width)
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)
