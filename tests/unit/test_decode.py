"""Views against PIL and torchvision: the same pixels, whichever library decoded them."""

import io
import resource

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from moco_dist.data.crops import centre_resize
from moco_dist.data.decode import cut, cut_pixels
from moco_dist.data.images import ImageError
from moco_dist.data.tasks import Crop

SIZE = 64  # so that only what is meant to be decoded at a smaller size is
WHOLE = Crop((0, 0, 150, 120))


@pytest.fixture(scope="module")
def picture():
    """A smooth picture of 150 x 120 pixels with some noise, as photographs have."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    coarse = small.resize((150, 120), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (120, 150, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(view):
    return view.permute(1, 2, 0).numpy().astype(int)


def pils(data, crop, size=SIZE):
    """The same view by PIL alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    view = np.asarray(image.crop(crop.box).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    return view[:, ::-1] if crop.flip else view


@pytest.mark.parametrize(
    "crop", [WHOLE, Crop((10, 20, 100, 90), flip=True), Crop((30, 30, 50, 45)), Crop((149, 119, 150, 120))]
)
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}), ("RGB", {"subsampling": 0}), ("RGB", {"subsampling": "4:1:1"}), ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True}), ("L", {}), ("CMYK", {}), ("RGB", {"kind": "PNG"}), ("RGBA", {"kind": "PNG"}),
        ("P", {"kind": "PNG"}), ("RGB", {"kind": "WEBP"}),
    ],
)  # fmt: skip
def test_views_are_pils_within_a_level(picture, mode, options, crop):
    data = encoded(picture.convert(mode), **options)
    view = pixels_of(cut(data, "x", SIZE, lambda width, height: [crop])[0])
    difference = abs(view - pils(data, crop))
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.parametrize("smallest", [None, 60.0, 200.0, 300.0, 1000.0])
@pytest.mark.parametrize("times", [1, 2, 5, 10])
def test_both_views_of_one_decode_are_those_of_two(picture, times, smallest):
    data = encoded(picture.resize((150 * times, 120 * times)))
    boxes = [(0, 0, 90, 90), (40, 20, 150, 120), (70, 50, 100, 75)]
    crops = [Crop(tuple(x * times for x in box), flip=i == 1, smallest=smallest) for i, box in enumerate(boxes)]
    together = cut(data, "x", SIZE, lambda width, height: crops)
    for view, crop in zip(together, crops, strict=True):
        assert (pixels_of(view) == pixels_of(cut(data, "x", SIZE, lambda w, h, crop=crop: [crop])[0])).all()


def test_an_image_is_decoded_anew_into_memory_that_a_larger_one_has_used(picture):
    expected = cut(encoded(picture.crop((0, 0, 30, 40))), "x", SIZE, lambda w, h: [Crop((0, 0, w, h))])[0]
    cut(encoded(picture.resize((300, 200))), "x", SIZE, lambda w, h: [Crop((0, 0, 40, 40))])
    again = cut(encoded(picture.crop((0, 0, 30, 40))), "x", SIZE, lambda w, h: [Crop((0, 0, w, h))])[0]
    assert (again == expected).all()


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_large_crops_are_decoded_at_a_smaller_size_and_change_little(picture, factor, monkeypatch):
    large = encoded(picture.resize((150 * factor, 120 * factor), Image.Resampling.BICUBIC), quality=92)
    crop = Crop((11 * factor + 1, 9 * factor + 1, 81 * factor, 75 * factor))
    difference = abs(pixels_of(cut(large, "x", SIZE, lambda w, h: [crop])[0]) - pils(large, crop))
    assert 0 < difference.mean() < 0.7
    assert difference.max() < 12


# The last two are so oblong that only their middle is resized.
@pytest.mark.parametrize("size", [(150, 120), (90, 150), (64, 64), (2300, 72), (2320, 70), (9, 400)])
def test_the_centre_crop_is_torchvisions(picture, size):
    image = picture.resize(size)
    data = encoded(image, "PNG")
    crop = Crop((0, 0, *size), resized=centre_resize(*size, 72, SIZE))
    expected = np.asarray(Compose([Resize(72), CenterCrop(SIZE)])(image)).astype(int)
    difference = abs(pixels_of(cut(data, "x", SIZE, lambda w, h: [crop])[0]) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda p: b"", "the file is empty"),
        (lambda p: b"<html>404</html>", "not an image"),
        (lambda p: encoded(p)[:-300], "truncated"),
        (lambda p: encoded(p, "PNG")[:-3000], "truncated"),
        (lambda p: encoded(Image.new("I", (9, 9)), "TIFF"), "32-bit"),
    ],
)
def test_what_cannot_be_decoded_is_named(picture, data, reason):
    with pytest.raises(ImageError, match=f"cannot read image a/b.jpg: .*{reason}"):
        cut(data(picture), "a/b.jpg", SIZE, lambda width, height: [WHOLE])


def test_a_bomb_is_refused_without_decoding_it(picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="decompression bomb"):
        cut(encoded(picture), "x.jpg", SIZE, lambda width, height: [WHOLE])


@pytest.mark.parametrize("box", [(0, 0, 150, 120), (7, 9, 7 + SIZE, 9 + SIZE), (30, 30, 50, 45)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_views_are_channels_last_and_memory_of_their_own(picture, box, kind):
    data = encoded(picture, kind)
    crops = [Crop(box), Crop((20, 30, 20 + SIZE, 30 + SIZE)), Crop(box, flip=True)]
    first, second, mirrored = cut(data, "x", SIZE, lambda w, h: crops)
    kept = first.clone()
    cut(encoded(picture.rotate(180), kind), "x", SIZE, lambda w, h: crops)
    assert (first == kept).all() and (mirrored.flip(-1) == kept).all() and (second != kept).any()
    assert all(view.permute(1, 2, 0).is_contiguous() for view in (first, second, mirrored))


def test_of_an_oblong_image_only_what_a_view_needs_takes_memory():
    """All of it would be a stripe of 64 x 1,280,000 pixels."""
    crop = Crop((0, 0, 20_000, 1), resized=centre_resize(20_000, 1, 64, 56))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (view,) = cut_pixels(np.full((1, 20_000, 3), 9, np.uint8), 56, [crop])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # kilobytes
    assert view.shape == (3, 56, 56) and (view == 9).all()
