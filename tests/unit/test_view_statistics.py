"""1,000 views as they reach the encoder against 1,000 of torchvision's own pipeline: the same statistics.

The parameters are read off the pixels, not off the draws: from an image of which every operation leaves another trace.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from moco_dist.config.pretrain import AugmentConfig
from moco_dist.data.colours import apply_colours, draw_colours
from moco_dist.data.counter_rng import STREAM_COLOUR_K, STREAM_COLOUR_Q

COUNT, SIZE = 1000, 32
ONE_IN = 1e-3  # a fixed seed: the comparison holds or not, once and for all


def pattern() -> torch.Tensor:
    """uint8 (3, S, S): a left half of soft colours, which no factor of up to 1.4 clips, and an edge to a gray half."""
    image = np.full((3, SIZE, SIZE), 90, dtype=np.uint8)
    image[:, :, : SIZE // 2] = np.array([120, 90, 70], dtype=np.uint8)[:, None, None]
    image[:, : SIZE // 2] += 20
    return torch.from_numpy(image)


def by_moco_dist(config: AugmentConfig, stream: int) -> torch.Tensor:
    """(COUNT, 3, S, S) in [0, 1]."""
    views = pattern().expand(COUNT, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    normalised = apply_colours(views, draw_colours(config, 0, 5, np.arange(COUNT), stream), config)
    return normalised * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]


def by_torchvision(config: AugmentConfig) -> torch.Tensor:
    """The same by the reference pipeline, which draws for itself."""
    torch.manual_seed(0)
    pipeline = v2.Compose([
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.ColorJitter(*config.jitter)], config.jitter_probability),
        v2.RandomGrayscale(config.grayscale_probability),
        v2.RandomApply([v2.GaussianBlur(13, config.blur_sigma)], config.blur_probability),
    ])  # fmt: skip
    return torch.stack([pipeline(pattern()) for _ in range(COUNT)])


def traces(views: torch.Tensor) -> dict[str, np.ndarray]:
    """What each operation leaves behind, one number a view; taken away from the edges where the blur does not reach."""
    flat = views[:, :, -2, 1].double()  # a coloured place
    gray = views[:, :, -2, -2].double()  # a gray one: neither saturation nor hue change it
    upper = views[:, :, 1, -2].double()  # another gray one, lighter by 20
    r, g, b = flat.unbind(1)
    chroma = flat.amax(1) - flat.amin(1)
    edge = (views[:, 0, SIZE // 2, -2] - views[:, 0, SIZE // 2 - 1, -2]).double()
    return {
        "level": gray[:, 0],  # brightness and contrast
        "contrast": (upper - gray)[:, 0],  # brightness x contrast
        "chroma": chroma / (upper - gray)[:, 0],  # saturation, and 0 where gray
        "hue": torch.where(chroma > 1e-3, torch.atan2(3**0.5 * (g - b), 2 * r - g - b), 0),
        "edge": edge / (upper - gray)[:, 0],  # blur's sigma; -1 without it
    }  # fmt: skip


def happened(of: dict[str, np.ndarray], untouched: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whether each operation was applied to each view."""
    return {
        "jitter": np.abs(of["contrast"] - untouched["contrast"]) > 1e-5,
        "grayscale": of["chroma"] < 1e-3,
        "blur": np.abs(of["edge"] - untouched["edge"]) > 1e-5,
    }


@pytest.fixture(scope="module")
def measured():
    """Traces by pipeline, and the untouched image's; recipe v2."""
    config = AugmentConfig()
    pipelines = {"q": by_moco_dist(config, STREAM_COLOUR_Q), "k": by_moco_dist(config, STREAM_COLOUR_K),
                 "torchvision": by_torchvision(config)}  # fmt: skip
    found = {name: {k: v.numpy() for k, v in traces(views).items()} for name, views in pipelines.items()}
    untouched = {k: v.numpy() for k, v in traces(pattern()[None] / 255).items()}
    return config, found, untouched


@pytest.mark.parametrize("view", ["q", "k", "torchvision"])
def test_every_operation_happens_as_often_as_the_recipe_says(measured, view):
    config, found, untouched = measured
    for name, events in happened(found[view], untouched).items():
        probability = getattr(config, f"{name}_probability")
        # A blur of sigma under 0.2 moves no float32 visibly: 1 in 19 of them.
        low, high = (0.94 * probability, probability) if name == "blur" else (probability, probability)
        count = int(events.sum())
        assert stats.binomtest(count, COUNT, low, alternative="less").pvalue > ONE_IN, (name, count)
        assert stats.binomtest(count, COUNT, high, alternative="greater").pvalue > ONE_IN, (name, count)


@pytest.mark.parametrize("view", ["q", "k"])
@pytest.mark.parametrize("trace", ["level", "contrast", "chroma", "hue", "edge"])
def test_what_factors_leave_is_distributed_as_torchvision_s(measured, view, trace):
    _, found, untouched = measured
    ours, theirs = (found[name][trace] for name in (view, "torchvision"))
    assert stats.ks_2samp(ours, theirs).pvalue > ONE_IN
    # and again among the views that were changed, where no atom of untouched ones hides a difference
    ours, theirs = (values[np.abs(values - untouched[trace]) > 1e-5] for values in (ours, theirs))
    assert min(len(ours), len(theirs)) > COUNT // 4
    assert stats.ks_2samp(ours, theirs).pvalue > ONE_IN


@pytest.mark.parametrize("change", [{"jitter": (0.4, 0.4, 0.4, 0.2)}, {"jitter": (0.6, 0.4, 0.4, 0.1)},
                                    {"blur_sigma": (0.1, 1.0)}, {"jitter_probability": 0.6}])  # fmt: skip
def test_another_recipe_is_told_apart(measured, change):
    """The tests above can fail: statistics of a recipe that differs in one number are not torchvision's."""
    config, found, _ = measured
    other = AugmentConfig(**{**config.model_dump(), **change})
    ours = {k: v.numpy() for k, v in traces(by_moco_dist(other, STREAM_COLOUR_Q)).items()}
    assert min(stats.ks_2samp(ours[k], found["torchvision"][k]).pvalue for k in ours) < ONE_IN
