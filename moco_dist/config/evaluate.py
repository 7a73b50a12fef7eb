"""The schema of every setting of `moco-dist knn`, `linear`, `finetune` and `detect`; see `config`.

Sources: v1 = MoCo (arXiv 1911.05722); OpenSelfSup = its semi-supervised benchmark, which includes MoCo v2.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moco_dist.config.address import DataRoot
from moco_dist.config.architectures import KNOWN, Architecture
from moco_dist.config.loading import DEFAULT_WORKERS, Loader, LoadingConfig
from moco_dist.config.section import PositiveInt, Probability, Section, setting

DETECTION_SOURCE = "the original release's detection/configs/pascal_voc_R_50_C4_24k"
Encoders = tuple[Literal["trained", "untrained", "pixels"], ...]


class EvalDataConfig(LoadingConfig):
    """Images to evaluate on."""

    root: DataRoot | None = setting(
        None, "a run's, with a validation set; default: the run's data.root", changes="place"
    )
    resize: int | None = setting(
        None,
        "short side before the centre crop; default: 8/7 of the crop",
        changes="result",
        unit="pixels",
        source="v1 sec. 4.1",
        gt=0,
    )
    image_size: int | None = setting(
        None, "centre crop; default: the run's data.image_size", changes="result", unit="pixels", gt=0
    )
    batch_size: PositiveInt = setting(256, "images a rank encodes at once", changes="speed", unit="samples")
    loader: Loader | None = setting(None, "who decodes and crops; default: the run's data.loader", changes="result")
    on_error: Literal["fail"] = setting(
        "fail", "an evaluation counts every image: a file that cannot be read ends it", changes="result"
    )
    max_train_samples: int | None = setting(
        None, "use this many training images, spread evenly", changes="result", gt=0
    )
    label_fraction: float = setting(
        1.0,
        "share of every class's training images that are used, always the same ones: 0.01 and 0.1 are customary",
        changes="result",
        gt=0,
        le=1,
    )
    max_val_samples: int | None = setting(
        None, "use this many validation images, spread evenly", changes="result", gt=0
    )


class TransferConfig(Section):
    """What is taken over from the pre-trained encoder."""

    keep_head_layers: int = setting(
        0,
        "layers of the projection head, each with its ReLU, kept below the classifier; 0 is the backbone alone",
        changes="result",
        ge=0,
    )


class EvalConfig(Section):
    """What every evaluation shares."""

    run_dir: Path = setting(..., "folder of the pre-training run", changes="place")
    encoders: Encoders = setting(
        ("trained",),
        "what gives the features: the run's query encoder, the same network before training, or the "
        "raw pixels of the crop",
        changes="record",
        min_length=1,
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes CUDA where there is a GPU", changes="place")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "autocast of the encoder", changes="result")
    data: EvalDataConfig = EvalDataConfig()
    transfer: TransferConfig = TransferConfig()
    tracking: Literal["mlflow", "none"] = setting(
        "mlflow", "mlflow: a child of the pre-training's run", changes="record"
    )


class KnnConfig(EvalConfig):
    """`moco-dist knn`: weighted nearest neighbours in the frozen features' cosine distance."""

    neighbours: tuple[PositiveInt, ...] = setting(
        (10, 20, 100, 200),
        "k, one accuracy each",
        changes="result",
        source="Wu et al. 2018, arXiv 1805.01978",
        min_length=1,
    )
    temperature: float = setting(
        0.07, "of a neighbour's weight exp(cosine / temperature)", changes="result", source="arXiv 1805.01978", gt=0
    )


class SweepConfig(Section):
    """Further classifiers, trained at once on the same features: one more matrix product each."""

    lrs: tuple[Annotated[float, Field(gt=0)], ...] = setting(
        (), "their learning rates; [] is no sweep", changes="result"
    )
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = setting(
        (0.0,), "each rate is tried with each of them", changes="result", min_length=1
    )
    held_out_share: float = setting(
        0.05,
        "of every class's training images: they train none of these, and choose the best",
        changes="result",
        gt=0,
        le=0.5,
    )


class LinearConfig(EvalConfig):
    """`moco-dist linear`: a linear classifier on the frozen backbone, MoCo's recipe."""

    features: Literal["augmented", "cached"] = setting(
        "augmented",
        "augmented: random resized crops and flips through the frozen backbone in every epoch, as "
        "published; cached: centre crops, encoded once (minutes, and a little lower)",
        changes="result",
    )
    epochs: PositiveInt = setting(100, "length of the training", changes="result", unit="epochs", source="v1 sec. 4.1")
    global_batch_size: PositiveInt = setting(
        256, "over all ranks", changes="result", unit="samples", source="v1 sec. 4.1"
    )
    lr: float = setting(30.0, "at the start, at any batch size", changes="result", source="v1 sec. 4.1", gt=0)
    milestones: tuple[PositiveInt, ...] = setting(
        (60, 80), "epochs at which the rate is multiplied by 0.1", changes="result", unit="epochs", source="v1 sec. 4.1"
    )
    sgd_momentum: float = setting(0.9, "of SGD", changes="result", source="v1 sec. 4.1", ge=0, lt=1)
    weight_decay: float = setting(0.0, "of SGD", changes="result", source="v1 sec. 4.1", ge=0)
    crop_scale: tuple[Probability, Probability] = setting(
        (0.08, 1.0), "augmented: random resized crop's range of the share of the area", changes="result"
    )
    sweep: SweepConfig = SweepConfig()
    seed: int = setting(
        0, "of the classifier's weights, the order of samples and the crops", changes="result", ge=0, lt=2**31
    )


class FinetuneConfig(EvalConfig):
    """`moco-dist finetune`: the whole network trained with labels, from the pre-trained weights."""

    encoders: tuple[Literal["trained", "untrained"], ...] = setting(
        ("trained",),
        "what the training starts from: the run's query encoder, or the same network before training",
        changes="record",
        min_length=1,
    )
    epochs: PositiveInt = setting(20, "length of the training", changes="result", unit="epochs", source="OpenSelfSup")
    global_batch_size: PositiveInt = setting(
        256,
        "over all ranks; a rank's share is whole BN groups of the pre-training's size",
        changes="result",
        unit="samples",
        source="OpenSelfSup",
    )
    backbone_lr: float = setting(
        0.01, "of the pre-trained weights, at the start", changes="result", source="OpenSelfSup", gt=0
    )
    classifier_lr: float = setting(
        1.0, "of the new linear layer, at the start", changes="result", source="OpenSelfSup", gt=0
    )
    milestones: tuple[PositiveInt, ...] = setting(
        (12, 16),
        "epochs at which both rates are multiplied by lr_decay",
        changes="result",
        unit="epochs",
        source="OpenSelfSup",
    )
    lr_decay: float = setting(0.2, "factor at a milestone", changes="result", source="OpenSelfSup", gt=0, le=1)
    sgd_momentum: float = setting(0.9, "of SGD", changes="result", source="OpenSelfSup", ge=0, lt=1)
    weight_decay: float = setting(
        1e-4, "of SGD, on every parameter; 5e-4 with 1 % of the labels", changes="result", source="OpenSelfSup", ge=0
    )
    crop_scale: tuple[Probability, Probability] = setting(
        (0.08, 1.0), "random resized crop's range of the share of the area", changes="result", source="OpenSelfSup"
    )
    seed: int = setting(
        0, "of the classifier's weights, the order of samples and the crops", changes="result", ge=0, lt=2**31
    )


VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class DetectDataConfig(Section):
    """Images with boxes, in the folders of PASCAL VOC."""

    root: Path = setting(
        ..., "folder with JPEGImages, Annotations and ImageSets/Main, or of several such folders", changes="place"
    )
    train_sets: tuple[str, ...] = setting(
        ("VOC2007/trainval", "VOC2012/trainval"),
        "FOLDER/SET is ROOT/FOLDER/ImageSets/Main/SET.txt; SET alone is of ROOT itself",
        changes="result",
        source="v1 sec. 4.2.1",
        min_length=1,
    )
    test_sets: tuple[str, ...] = setting(
        ("VOC2007/test",), "the same", changes="result", source="v1 sec. 4.2.1", min_length=1
    )
    classes: tuple[str, ...] = setting(
        VOC_CLASSES, "names of the objects; another name is an error", changes="result", min_length=1
    )
    num_workers: int | None = setting(
        None,
        "loader processes per rank (0 loads in the training process); default: " + DEFAULT_WORKERS,
        changes="speed",
        ge=0,
        le=256,
    )


class DetectConfig(Section):
    """`moco-dist detect`: Faster R-CNN on the backbone, all of it trained, on images with boxes."""

    run_dir: Path | None = setting(
        None, "folder of the pre-training run; the result is RUN/eval/detection.json", changes="place"
    )
    weights: Path | None = setting(
        None,
        "instead of a run: a file as `moco-dist import` takes it; the result is FILE.detection.json",
        changes="place",
    )
    arch: Architecture = setting(
        "resnet50", f"of the network in `weights`: a ResNet; model.arch is one of {KNOWN}", changes="result"
    )
    data: DetectDataConfig
    steps: PositiveInt = setting(
        24_000, "length of the training", changes="result", unit="steps", source=DETECTION_SOURCE
    )
    global_batch_size: PositiveInt = setting(
        16, "over all ranks", changes="result", unit="images", source=DETECTION_SOURCE
    )
    lr: float = setting(0.02, "after the warm-up, at any batch size", changes="result", source=DETECTION_SOURCE, gt=0)
    warmup_steps: int = setting(
        100, "the rate grows linearly", changes="result", unit="steps", source=DETECTION_SOURCE, ge=0
    )
    milestones: tuple[PositiveInt, ...] = setting(
        (18_000, 22_000),
        "steps at which the rate is multiplied by 0.1",
        changes="result",
        unit="steps",
        source=DETECTION_SOURCE,
    )
    sgd_momentum: float = setting(0.9, "of SGD", changes="result", ge=0, lt=1)
    weight_decay: float = setting(1e-4, "of SGD, on all but BatchNorm", changes="result", ge=0)
    short_sides: tuple[Annotated[int, Field(ge=32, le=4096)], ...] = setting(
        tuple(range(480, 801, 32)),
        "in training, one of them for each image; in the test, the largest",
        changes="result",
        unit="pixels",
        source="v1 sec. 4.2.1",
        min_length=1,
    )
    seed: int = setting(
        0,
        "of the detector's weights, the order of images, flips, sizes and sampled boxes",
        changes="result",
        ge=0,
        lt=2**31,
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes CUDA where there is a GPU", changes="place")
    tracking: Literal["mlflow", "none"] = setting(
        "mlflow", "mlflow: a child of the pre-training's run", changes="record"
    )

    @model_validator(mode="after")
    def _one_backbone(self) -> "DetectConfig":
        if (self.run_dir is None) == (self.weights is None):
            raise ValueError("give either run_dir, the folder of a run, or weights, a file of weights")
        return self
