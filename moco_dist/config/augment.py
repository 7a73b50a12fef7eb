"""How a view is made of an image: the settings of crops and colours, and the papers' recipes.

Sources: v1 = MoCo (arXiv 1911.05722), v2 = MoCo v2 (arXiv 2003.04297).
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moco_dist.config.section import Positive, Probability, Section, setting

RECIPES: dict[str, dict[str, Any]] = {
    "v1": {
        "jitter": (0.4, 0.4, 0.4, 0.4),
        "jitter_probability": 1.0,
        "blur_probability": 0.0,
    },
    "v2": {
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "jitter_probability": 0.8,
        "blur_probability": 0.5,
    },
    "simclr": {
        "crop_scale": (0.08, 1.0),
        "jitter": (0.8, 0.8, 0.8, 0.2),
        "jitter_probability": 0.8,
        "blur_probability": 0.5,
    },
}


class AugmentConfig(Section):
    """How a view is made. `recipe` sets crops, jitter and blur; any of them may be given instead."""

    recipe: Literal["v1", "v2", "simclr"] = setting(
        "v2",
        "v1: MoCo's; v2: aug+, with blur; simclr: twice the jitter, smaller crops",
        changes="result",
        times=("step",),
        source="v2 sec. 3; arXiv 2002.05709, app. A",
    )
    crop_scale: tuple[Probability, Probability] = setting(
        (0.2, 1.0),
        "random resized crop: range of the share of the area",
        changes="result",
        times=("step", "loader"),
        source="v1 sec. 3.3",
    )
    jitter: tuple[
        Annotated[float, Field(ge=0)],
        Annotated[float, Field(ge=0)],
        Annotated[float, Field(ge=0)],
        Annotated[float, Field(ge=0, le=0.5)],
    ] = setting(
        (0.4, 0.4, 0.4, 0.1),
        "strength of brightness, contrast, saturation, hue",
        changes="result",
        times=("step",),
        source="v2 sec. 3",
    )
    jitter_probability: Probability = setting(
        0.8, "share of views with colour jitter", changes="result", times=("step",), source="v2 sec. 3"
    )
    grayscale_probability: Probability = setting(
        0.2, "share of gray views", changes="result", times=("step",), source="v1 sec. 3.3"
    )
    blur_probability: Probability = setting(
        0.5, "share of blurred views", changes="result", times=("step",), source="v2 sec. 3"
    )
    blur_sigma: tuple[Positive, Positive] = setting(
        (0.1, 2.0),
        "range of the Gaussian blur's standard deviation",
        changes="result",
        times=("step",),
        unit="pixels",
        source="v2 sec. 3",
    )
    flip_probability: Probability = setting(
        0.5, "share of mirrored views", changes="result", times=("step",), source="v1 sec. 3.3"
    )
    mean: tuple[float, float, float] = setting(
        (0.485, 0.456, 0.406), "of R, G, B in [0, 1]", changes="result", times=("step",)
    )
    std: tuple[Positive, Positive, Positive] = setting(
        (0.229, 0.224, 0.225), "of R, G, B in [0, 1]", changes="result", times=("step",)
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return {**RECIPES.get(given.get("recipe", "v2"), {}), **given}
        return given

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "AugmentConfig":
        for name in ("crop_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} ({low}, {high}) is not a range; 0 < low <= high is")
        return self
