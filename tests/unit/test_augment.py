"""Colours are torchvision's, sample by sample; their parameters have its distribution and depend on nothing else."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torchvision.transforms.v2 import functional as F

from moco_dist.config.pretrain import AugmentConfig
from moco_dist.data.colours import COLOUR_COLUMNS, _apply, _make_neighbours, apply_colours, draw_colours
from moco_dist.data.counter_rng import STREAM_COLOUR_K, STREAM_COLOUR_Q

JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
IDENTITY = dict.fromkeys(COLOUR_COLUMNS, 0.0) | {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
IDENTITY |= {f"order_{i}": float(i) for i in range(4)}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def photo(size: int, seed: int) -> torch.Tensor:
    """uint8 (3, S, S): smooth shading with the 1/f spectrum of photographs, and a few hard-edged patches."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) / (frequency + 1 / size)
    image = np.fft.irfft2(spectrum, s=(size, size))
    image = 0.5 + 0.2 * (image / image.std() + rng.standard_normal((3, 1, 1)))
    for _ in range(6):
        top, left = rng.integers(0, size - 2, 2)
        image[:, top : top + size // 4, left : left + size // 5] = rng.random((3, 1, 1))
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8))


def noise(size: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, size, size), dtype=np.uint8))


def cube(size: int, seed: int) -> torch.Tensor:
    """Black, white, grays, pure and mixed colours: where HSV's sectors meet."""
    colours = np.array(list(itertools.product((0, 1, 127, 254, 255), repeat=3)), dtype=np.uint8)
    pixels = np.random.default_rng(seed).integers(0, len(colours), (size, size))
    return torch.from_numpy(colours[pixels].transpose(2, 0, 1).copy())


def colours_of(*rows: dict[str, float]) -> torch.Tensor:
    return torch.tensor([[(IDENTITY | row)[name] for name in COLOUR_COLUMNS] for row in rows], dtype=torch.float32)


def mixed_batch(size: int, config: AugmentConfig, count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of all kinds, channels-last as loaders give them, and drawn colours."""
    kinds = itertools.cycle((photo, noise, cube))
    views = torch.stack([kind(size, seed) for seed, kind in zip(range(count), kinds, strict=False)])
    colours = draw_colours(config, 3, 7, np.arange(count), STREAM_COLOUR_Q)
    return views.contiguous(memory_format=torch.channels_last), colours


def by_torchvision(view: torch.Tensor, row: torch.Tensor, radius: int) -> torch.Tensor:
    """One view in [0, 1], before normalisation."""
    values = dict(zip(COLOUR_COLUMNS, row.tolist(), strict=True))
    image = view.float() / 255
    for i in range(4):
        operation = int(values[f"order_{i}"])
        image = JITTER[operation](image, values[COLOUR_COLUMNS[operation]])
    if values["grayscale"]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if values["blur_sigma"]:
        image = F.gaussian_blur(image, [2 * radius + 1] * 2, [values["blur_sigma"]] * 2)
    return image


def without_normalisation(x: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    return x * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]


@pytest.mark.parametrize("recipe", ["v1", "v2"])
@pytest.mark.parametrize("size", [8, 32, 90])
def test_every_sample_is_as_torchvision_makes_it(recipe, size):
    config = AugmentConfig(recipe=recipe)
    views, colours = mixed_batch(size, config)
    ours = without_normalisation(apply_colours(views, colours, config), config)
    for view, row, mine in zip(views, colours, ours, strict=True):
        # A level is 1/255 = 4e-3; what is left is the rounding of float32.
        torch.testing.assert_close(mine, by_torchvision(view, row, radius=6), atol=2e-5, rtol=0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_four_jitters_are_applied_in_the_drawn_order(order):
    config = AugmentConfig(mean=(0, 0, 0), std=(1, 1, 1))
    row = {"brightness": 1.4, "contrast": 1.4, "saturation": 0.6, "hue": -0.1}
    colours = colours_of(row | {f"order_{i}": operation for i, operation in enumerate(order)})
    view = cube(16, 0)
    expected = by_torchvision(view, colours[0], radius=6)
    torch.testing.assert_close(apply_colours(view[None], colours, config)[0], expected, atol=2e-5, rtol=0)


def test_a_large_turn_of_the_hue_goes_round_the_circle():
    config = AugmentConfig(mean=(0, 0, 0), std=(1, 1, 1))
    views = torch.stack([cube(16, 0)] * 6)
    colours = colours_of(*({"hue": hue} for hue in (-0.5, -0.4, -0.17, 0.17, 0.4, 0.5)))
    ours = apply_colours(views, colours, config)
    for view, row, mine in zip(views, colours, ours, strict=True):
        torch.testing.assert_close(mine, by_torchvision(view, row, radius=6), atol=2e-5, rtol=0)


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_doing_everything_gives_what_skipping_gives(recipe):
    """A GPU computes every operation for every sample; a CPU leaves out what is not needed."""
    config = AugmentConfig(recipe=recipe)
    views, colours = mixed_batch(40, config)
    skipped = _apply(views, colours, config, torch.float32, skip=True)
    everything = _apply(views, colours, config, torch.float32, skip=False)
    torch.testing.assert_close(everything, skipped, atol=1e-5, rtol=0)


def test_the_host_never_waits_for_a_gpu():
    """Fake tensors have a device and no values: whatever reads one on the host raises."""
    with FakeTensorMode():
        views = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        colours = torch.empty(4, len(COLOUR_COLUMNS), device="cuda")
        out = apply_colours(views, colours, AugmentConfig(), torch.bfloat16)
        with pytest.raises(DynamicOutputShapeException):
            _apply(views, colours, AugmentConfig(), torch.bfloat16, skip=True)
    _make_neighbours.cache_clear()
    assert out.is_cuda
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_does_not_depend_on_its_batch():
    config = AugmentConfig()
    views, colours = mixed_batch(32, config)
    together = apply_colours(views, colours, config)
    rows = torch.tensor([5, 2, 19])
    torch.testing.assert_close(apply_colours(views[rows], colours[rows], config), together[rows], atol=1e-5, rtol=0)


def test_identity_colours_only_normalise():
    config = AugmentConfig()
    view = photo(16, 0)
    expected = F.normalize(view / 255, list(config.mean), list(config.std))
    torch.testing.assert_close(apply_colours(view[None], colours_of({}), config)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_result_is_channels_last_in_the_dtype_asked_for(dtype):
    config = AugmentConfig()
    views, colours = mixed_batch(16, config)
    before = views.clone(), colours.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not lower the precision of the arithmetic
        out = apply_colours(views, colours, config, dtype)
    assert out.dtype == dtype
    assert out.shape == views.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = apply_colours(views, colours, config, torch.float64)
    torch.testing.assert_close(out.double(), exact, atol=max(2e-5, 2 * torch.finfo(dtype).eps), rtol=0)
    assert torch.equal(views, before[0])
    assert torch.equal(colours, before[1])


def test_a_gaussian_wider_than_the_image_is_cut_off_at_its_border():
    config = AugmentConfig(mean=(0, 0, 0), std=(1, 1, 1), blur_sigma=(0.1, 4.0))
    view = photo(9, 0)
    colours = colours_of({"blur_sigma": 4.0})
    expected = by_torchvision(view, colours[0], radius=8)
    torch.testing.assert_close(apply_colours(view[None], colours, config)[0], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("sigma", "levels"), [(0.1, 0.1), (0.3, 2.6), (0.6, 1.1), (1.0, 0.7), (1.5, 0.7), (2.0, 0.7)])
def test_the_blur_is_close_to_the_one_of_pil(sigma, levels):
    """The original MoCo v2 blurred with PIL, which approximates the Gaussian by boxes and repeats the border.

    For comparison: at sigma 1 and 2 the blur itself changes these images by 15 and 20 levels on average.
    """
    config = AugmentConfig(mean=(0, 0, 0), std=(1, 1, 1))
    view = photo(224, 0)
    ours = apply_colours(view[None], colours_of({"blur_sigma": sigma}), config)[0] * 255
    image = Image.fromarray(view.permute(1, 2, 0).numpy())
    pil = torch.from_numpy(np.array(image.filter(ImageFilter.GaussianBlur(sigma)))).permute(2, 0, 1)
    assert (ours - pil).abs().mean() < levels


class TestDraws:
    """4,000 rows under the v2 recipe."""

    CONFIG = AugmentConfig()
    ROWS = draw_colours(CONFIG, 0, 11, np.arange(4000), STREAM_COLOUR_Q)

    def column(self, name: str) -> np.ndarray:
        return self.ROWS[:, COLOUR_COLUMNS.index(name)].numpy()

    def jittered(self) -> np.ndarray:
        return self.column("brightness") != 1

    def test_shape_and_dtype(self):
        assert self.ROWS.shape == (4000, len(COLOUR_COLUMNS))
        assert self.ROWS.dtype == torch.float32

    @pytest.mark.parametrize(
        ("name", "identity", "probability"),
        [("brightness", 1, 0.8), ("hue", 0, 0.8), ("grayscale", 0, 0.2), ("blur_sigma", 0, 0.5)],
    )
    def test_probability(self, name, identity, probability):
        happened = int((self.column(name) != identity).sum())
        assert stats.binomtest(happened, 4000, probability).pvalue > 1e-3

    def test_the_four_jitters_come_together_and_grayscale_and_blur_independently(self):
        for name, identity in (("contrast", 1), ("saturation", 1), ("hue", 0)):
            assert np.array_equal(self.column(name) != identity, self.jittered())
        events = [self.jittered(), self.column("grayscale") == 1, self.column("blur_sigma") > 0]
        for one, other in itertools.combinations(events, 2):
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.06

    @pytest.mark.parametrize(
        ("name", "low", "high"),
        [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.6, 1.4), ("hue", -0.1, 0.1)],
    )
    def test_factors_are_uniform(self, name, low, high):
        factors = self.column(name)[self.jittered()]
        assert stats.kstest(factors, stats.uniform(low, high - low).cdf).pvalue > 1e-3

    def test_sigma_is_uniform(self):
        sigma = self.column("blur_sigma")
        assert stats.kstest(sigma[sigma > 0], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3

    def test_all_orders_are_equally_likely(self):
        orders = self.ROWS[:, 4:8].numpy().astype(int)
        seen, counts = np.unique(orders, axis=0, return_counts=True)
        assert sorted(map(tuple, seen.tolist())) == list(itertools.permutations(range(4)))
        assert stats.chisquare(counts).pvalue > 1e-3

    def test_columns_are_uncorrelated(self):
        rows = self.ROWS[self.jittered()].numpy()[:, [0, 1, 2, 3, 8]]
        correlation = np.corrcoef(rows.T) - np.eye(5)
        assert np.abs(correlation).max() < 0.07
        positions = self.ROWS[self.jittered(), 4:8].argsort(1).numpy()  # of brightness, contrast, ...
        assert np.abs(np.corrcoef(rows.T, positions.T)[:5, 5:]).max() < 0.07


def test_a_row_is_a_function_of_seed_step_sample_and_view():
    config = AugmentConfig()
    samples = np.arange(100)
    rows = draw_colours(config, 1, 2, samples, STREAM_COLOUR_Q)
    some = np.array([70, 3, 3, 99])
    assert torch.equal(draw_colours(config, 1, 2, some, STREAM_COLOUR_Q), rows[torch.from_numpy(some)])
    for other in ((2, 2, STREAM_COLOUR_Q), (1, 3, STREAM_COLOUR_Q), (1, 2, STREAM_COLOUR_K)):
        seed, step, stream = other
        assert (draw_colours(config, seed, step, samples, stream) != rows).any(1).all()


def test_v1_never_blurs_and_always_jitters():
    rows = draw_colours(AugmentConfig(recipe="v1"), 0, 0, np.arange(500), STREAM_COLOUR_K)
    assert (rows[:, COLOUR_COLUMNS.index("blur_sigma")] == 0).all()
    assert (rows[:, :3] != 1).all()
    assert rows[:, COLOUR_COLUMNS.index("hue")].abs().max() > 0.35


def test_factors_stay_positive_for_strengths_above_one():
    rows = draw_colours(AugmentConfig(jitter=(1.5, 2.0, 1.0, 0.5)), 0, 0, np.arange(500), STREAM_COLOUR_Q)
    assert rows[:, :3].min() >= 0
    assert rows[:, 1].max() > 2.8
