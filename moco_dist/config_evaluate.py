"""The schema of every setting of `moco-dist knn` and `moco-dist linear`; see `config`.

Sources: v1 = MoCo (arXiv 1911.05722).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moco_dist.config import Loader, LoadingConfig, PositiveInt, Probability, Section, setting

ENCODERS = ("trained", "untrained", "pixels")
Encoders = tuple[Literal["trained", "untrained", "pixels"], ...]


class EvalDataConfig(LoadingConfig):
    """Images to evaluate on."""

    root: Path | None = setting(None, "ROOT/train and ROOT/val; default: the run's data.root")
    resize: int | None = setting(
        None, "short side before the centre crop; default: 8/7 of the crop", unit="pixels", source="v1 sec. 4.1", gt=0
    )
    image_size: int | None = setting(None, "centre crop; default: the run's data.image_size", unit="pixels", gt=0)
    batch_size: PositiveInt = setting(256, "images a rank encodes at once", unit="samples")
    loader: Loader | None = setting(None, "who decodes and crops; default: the run's data.loader")
    on_error: Literal["fail"] = setting("fail", "an evaluation counts every image: a file that cannot be read ends it")
    max_train_samples: int | None = setting(None, "use this many training images, spread evenly", gt=0)
    label_fraction: float = setting(
        1.0, "share of every class's training images that are used, always the same ones: 0.01 and 0.1 are customary",
        gt=0, le=1,
    )
    max_val_samples: int | None = setting(None, "use this many validation images, spread evenly", gt=0)


class TransferConfig(Section):
    """What is taken over from the pre-trained encoder."""

    keep_head_layers: int = setting(
        0, "layers of the projection head, each with its ReLU, kept below the classifier; 0 is the backbone alone", ge=0
    )


class EvalConfig(Section):
    """What every evaluation shares."""

    run_dir: Path = setting(..., "folder of the pre-training run")
    encoders: Encoders = setting(
        ("trained",), "what gives the features: the run's query encoder, the same network before training, or the "
        "raw pixels of the crop", min_length=1,
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes CUDA where there is a GPU")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "autocast of the frozen encoder")
    data: EvalDataConfig = EvalDataConfig()
    transfer: TransferConfig = TransferConfig()
    tracking: Literal["mlflow", "none"] = setting("mlflow", "mlflow: a child of the pre-training's run")


class KnnConfig(EvalConfig):
    """`moco-dist knn`: weighted nearest neighbours in the frozen features' cosine distance."""

    neighbours: tuple[PositiveInt, ...] = setting(
        (10, 20, 100, 200), "k, one accuracy each", source="Wu et al. 2018, arXiv 1805.01978", min_length=1
    )
    temperature: float = setting(0.07, "of a neighbour's weight exp(cosine / temperature)", source="arXiv 1805.01978",
                                 gt=0)


class SweepConfig(Section):
    """Further classifiers, trained at once on the same features: one more matrix product each."""

    lrs: tuple[Annotated[float, Field(gt=0)], ...] = setting((), "their learning rates; [] is no sweep")
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = setting(
        (0.0,), "each rate is tried with each of them", min_length=1
    )
    held_out_share: float = setting(
        0.05, "of every class's training images: they train none of these, and choose the best", gt=0, le=0.5
    )


class LinearConfig(EvalConfig):
    """`moco-dist linear`: a linear classifier on the frozen backbone, MoCo's recipe."""

    features: Literal["augmented", "cached"] = setting(
        "augmented", "augmented: random resized crops and flips through the frozen backbone in every epoch, as "
        "published; cached: centre crops, encoded once (minutes, and a little lower)",
    )
    epochs: PositiveInt = setting(100, "length of the training", unit="epochs", source="v1 sec. 4.1")
    global_batch_size: PositiveInt = setting(256, "over all ranks", unit="samples", source="v1 sec. 4.1")
    lr: float = setting(30.0, "at the start, at any batch size", source="v1 sec. 4.1", gt=0)
    milestones: tuple[PositiveInt, ...] = setting(
        (60, 80), "epochs at which the rate is multiplied by 0.1", unit="epochs", source="v1 sec. 4.1"
    )
    sgd_momentum: float = setting(0.9, "of SGD", source="v1 sec. 4.1", ge=0, lt=1)
    weight_decay: float = setting(0.0, "of SGD", source="v1 sec. 4.1", ge=0)
    crop_scale: tuple[Probability, Probability] = setting(
        (0.08, 1.0), "augmented: random resized crop's range of the share of the area"
    )
    sweep: SweepConfig = SweepConfig()
    seed: int = setting(0, "of the classifier's weights, the order of samples and the crops", ge=0, lt=2**31)
