"""The schema of every setting: its type, range, unit, default and source in the paper.

One frozen, strict model per command. No torch here, so that `--help` and a wrong flag answer at once.
Sources: v1 = MoCo (arXiv 1911.05722), v2 = MoCo v2 (arXiv 2003.04297).
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from moco_dist.config.address import DataRoot
from moco_dist.config.architectures import KNOWN, Architecture, is_known_without_torch
from moco_dist.config.augment import AugmentConfig
from moco_dist.config.loading import Loader, LoadingConfig, OnError
from moco_dist.config.methods import MocoConfig, SimclrConfig
from moco_dist.config.run import CheckpointConfig, LogConfig, RunConfig, TrackingConfig
from moco_dist.config.section import PositiveInt, Section, setting
from moco_dist.errors import UserError, not_a_multiple


class DataConfig(LoadingConfig):
    """Images: a folder of class folders, one with `train/` and `val/` of them, tar shards, or a packed file."""

    root: DataRoot = setting(
        ...,
        "ROOT/train and ROOT/val, a folder of images alone (then there is no validation set), tar shards (a folder of "
        "them, or a pattern such as 'set-train-{0000..1023}.tar'), or for the loader ffcv a file written by "
        "`moco-dist data pack`; shards and packed files also at s3://, gs://, az:// and https://",
        changes="place",
        per_host=True,
        times=("loader",),
    )
    image_size: int = setting(
        224,
        "side of a crop",
        changes="result",
        times=("step", "loader"),
        unit="pixels",
        source="v1 sec. 3.3",
        ge=8,
        le=1024,
    )
    loader: Loader = setting(
        "torchvision",
        "who decodes and crops; all give the same views. torchvision: works everywhere; dali: also "
        "decodes on the GPU; ffcv: reads one packed file",
        changes="speed",
        times=("loader",),
    )
    on_error: OnError = setting(
        "fail",
        "a file that cannot be read ends the run, or its successor takes its place and it is named in the log",
        changes="result",
    )
    max_samples: int | None = setting(
        None, "use this many training images, spread evenly over the set", changes="result", gt=0
    )


class ModelConfig(Section):
    """The encoder f: backbone, projection head and its BN groups."""

    arch: Architecture = setting(
        "resnet50",
        f"torchvision's ResNet (resnet10: one basic block a stage), or another network: {KNOWN}",
        changes="shapes",
        times=("step",),
        source="v1 sec. 3.3",
    )
    stem: Literal["imagenet", "cifar"] = setting(
        "imagenet",
        "imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1, for images of about 32 pixels",
        changes="shapes",
        times=("step",),
    )
    init: Path | None = setting(
        None,
        "what the backbones of both encoders begin with: a file that `moco-dist import` reads, the folder of a run, or "
        "timm:NAME; default: random weights. A run that goes on has those of its checkpoint",
        changes="result",
    )
    head_hidden_dims: tuple[PositiveInt, ...] = setting(
        (2048,),
        "hidden sizes of the MLP head, ReLU between; [] is v1's linear head",
        changes="shapes",
        times=("step",),
        source="v2 sec. 3",
    )
    embedding_dim: PositiveInt = setting(
        128, "C, size of q and k", changes="shapes", times=("step",), source="v1 sec. 3.3"
    )
    bn_group_size: PositiveInt = setting(
        32,
        "samples that share BatchNorm statistics, whatever the number of GPUs (256 over 8 GPUs)",
        changes="result",
        times=("step",),
        unit="samples",
        source="v1 sec. 3.3",
    )


class OptimConfig(Section):
    """The optimiser and its schedule."""

    epochs: int = setting(200, "length of the schedule", changes="result", unit="epochs", source="v2 Table 1", gt=0)
    global_batch_size: PositiveInt = setting(
        256,
        "samples of one optimiser step, over all ranks and accumulation steps",
        changes="result",
        unit="samples",
        source="v1 sec. 3.3",
    )
    grad_accum_steps: PositiveInt = setting(
        1, "micro-batches a rank splits its share of a step into", changes="speed", times=("step",)
    )
    optimizer: Literal["sgd", "lars", "adamw"] = setting(
        "sgd",
        "lars: for batches of thousands; adamw (betas 0.9, 0.999): for vision transformers",
        changes="result",
        times=("step",),
        source="v1 sec. 3.3; LARS: arXiv 1708.03888; AdamW: arXiv 1711.05101",
    )
    base_lr: float = setting(0.03, "learning rate at batch 256", changes="result", source="v1 sec. 3.3", gt=0)
    lr_scaling: Literal["linear", "sqrt", "none"] = setting(
        "linear",
        "lr = base_lr x r, x sqrt(r) or x 1, with r = global_batch_size / 256",
        changes="result",
        source="arXiv 1706.02677",
    )
    warmup_epochs: float = setting(
        0.0,
        "the rate grows linearly from 0, at every step",
        changes="result",
        unit="epochs",
        source="arXiv 1706.02677",
        ge=0,
    )
    sgd_momentum: float = setting(0.9, "of SGD and LARS", changes="result", source="v1 sec. 3.3", ge=0, lt=1)
    weight_decay: float = setting(
        1e-4,
        "sgd: on every parameter; lars: on weights of two dimensions or more; adamw: on those but position embeddings",
        changes="result",
        source="v1 sec. 3.3",
        ge=0,
    )
    trust_coefficient: float = setting(
        0.001, "lars: of the layer-wise rate", changes="result", source="arXiv 1708.03888", gt=0
    )
    clip_grad_norm: float | None = setting(
        None, "the most that the norm of all gradients may be; null: they are not clipped", changes="result", gt=0
    )
    # A further one is a case of `learning_rate` in engine/schedule.py; doctor alone asks for `step`, by its milestones.
    schedule: Literal["cosine", "step"] = setting(
        "cosine", "of the learning rate", changes="result", source="v2 sec. 3; v1: step"
    )
    schedule_unit: Literal["epoch", "step"] = setting(
        "epoch", "the learning rate changes once an epoch, as published, or at every step", changes="result"
    )
    milestones: tuple[PositiveInt, ...] = setting(
        (120, 160),
        "schedule step: epochs at which the rate is multiplied by 0.1",
        changes="result",
        unit="epochs",
        source="v1 sec. 3.3",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = setting(
        "auto",
        "autocast of the encoders (auto: bf16 on GPUs that have it, fp16 on others, fp32 on CPU); embeddings, "
        "loss, queue and BN statistics stay fp32. fp64 is for checking the mathematics",
        changes="result",
        times=("step",),
    )

    @property
    def state_numbers(self) -> int:
        """Numbers that the optimiser keeps for each parameter."""
        return 2 if self.optimizer == "adamw" else 1


class EngineConfig(Section):
    """Who takes the gradients and the optimiser's step, and how fast. All of it may change when a run goes on."""

    kind: Literal["ddp", "deepspeed"] = setting(
        "ddp", "deepspeed: pip install 'moco_dist[deepspeed]'", changes="speed", times=("step",)
    )
    zero_stage: int = setting(
        0,
        "deepspeed: 1 cuts the optimiser's state over the ranks, 2 the gradients too",
        changes="speed",
        times=("step",),
        ge=0,
        le=2,
        source="ZeRO, arXiv 1910.02054",
    )
    compile: Literal["off", "model", "step"] = setting(
        "off",
        "torch.compile of both encoders (model), and of LARS and, on GPUs, colours too (step)",
        changes="speed",
        times=("step",),
    )
    cuda_graphs: bool = setting(
        False, "replay what is compiled as CUDA graphs: for small batches a GPU", changes="speed", times=("step",)
    )
    cudnn_benchmark: bool = setting(
        True, "try cuDNN's algorithms for each shape, and keep the fastest", changes="speed", times=("step",)
    )
    allow_tf32: bool = setting(
        False,
        "TF32 (10-bit mantissa) in float32 convolutions and products: those of fp32 encoders, and the loss",
        changes="speed",
        times=("step",),
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return "off" if value is False else value


class ShuffleConfig(Section):
    """How keys are shuffled over BN groups, and how a rank gets the key views of the samples it encodes."""

    block_size: int | None = setting(
        None,
        "neighbouring samples of a batch among which keys are shuffled, whole BN groups; default: 256, or the "
        "nearest below it that divides the batch; 1, not at all, for networks without BatchNorm",
        changes="result",
        unit="samples",
        times=("loader",),
        source="v1 sec. 3.3",
        gt=0,
    )
    exchange: Literal["auto", "loader", "all_to_all", "all_gather"] = setting(
        "auto",
        "where a block lies on several ranks. auto: all_to_all within a host, loader between hosts; loader: a "
        "rank loads the key views it encodes, and no image is sent; all_to_all: every image is decoded once and its "
        "key crop sent as uint8 to the rank that encodes it; all_gather: every rank of the block gets every key view, "
        "as is usually done",
        changes="speed",
        times=("loader",),
    )


class PretrainConfig(Section):
    """`moco-dist pretrain`: MoCo v2, row (d) of Table 1, unless told otherwise."""

    run: RunConfig
    data: DataConfig
    method: Literal["moco", "simclr"] = setting(
        "moco",
        "moco: a queue of keys from a momentum encoder; simclr: end to end, for comparison",
        changes="shapes",
        times=("step",),
        source="v2; arXiv 2002.05709",
    )
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    moco: MocoConfig = MocoConfig()
    simclr: SimclrConfig = SimclrConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    shuffle: ShuffleConfig = ShuffleConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def of_method(self) -> MocoConfig | SimclrConfig:
        """The settings of the method that is used, which know what follows from them."""
        return getattr(self, self.method)

    @model_validator(mode="after")
    def _sizes_divide(self) -> "PretrainConfig":
        problems = size_problems(self, world_size=1) + block_problems(self) + engine_problems(self)
        problems += batch_norm_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def size_problems(config: PretrainConfig, world_size: int) -> list[str]:
    """What does not divide when `config` runs on `world_size` ranks, each with the two nearest sizes that do."""
    batch, accum = config.optim.global_batch_size, config.optim.grad_accum_steps
    group = config.model.bn_group_size
    unit = world_size * accum * group
    problems = []
    if batch % unit:
        what = f"{unit} = {world_size} rank(s) x optim.grad_accum_steps {accum} x model.bn_group_size {group}"
        problems.append(not_a_multiple("optim.global_batch_size", batch, unit, what))
    return problems + config.of_method.size_problems(batch, accum, world_size)


def require_sizes(config: PretrainConfig, world_size: int) -> None:
    """Refuse sizes that `world_size` ranks cannot share.

    Raises:
        UserError: one line for each problem.
    """
    if problems := size_problems(config, world_size):
        raise UserError("\n".join(problems))


DEFAULT_BLOCK_SIZE = 256  # samples of one host in the paper


def shuffle_block(config: PretrainConfig) -> int:
    """Samples among which keys are shuffled: `shuffle.block_size`, or its default; 1 where they are not."""
    return config.shuffle.block_size or default_block(config.optim.global_batch_size, config.model.bn_group_size)


def default_block(batch: int, group: int) -> int:
    """The largest size that works up to DEFAULT_BLOCK_SIZE, or where two BN groups are larger the smallest that works.

    A batch that is not larger is one block.
    """
    sizes = block_sizes(batch, group)
    return max((size for size in sizes if size <= DEFAULT_BLOCK_SIZE), default=sizes[0])


def block_sizes(batch: int, group: int) -> list[int]:
    """The sizes of a block that work, ascending: two or more whole BN groups that divide the batch, and the batch."""
    return [size for size in range(2 * group, batch, group) if batch % size == 0] + [batch]


def block_problems(config: PretrainConfig) -> list[str]:
    """What is wrong with shuffle.block_size, with the sizes that work."""
    size, batch, group = config.shuffle.block_size, config.optim.global_batch_size, config.model.bn_group_size
    if size is None or batch % group or size in (known := block_sizes(batch, group)):
        return []
    if size == 1 and not is_known_without_torch(config.model.arch):
        return []  # whether the network has a BatchNorm, method/build.py looks
    return [
        f"shuffle.block_size {size} has to be two or more BN groups of {group} (model.bn_group_size) and divide "
        f"optim.global_batch_size {batch}; these do: {', '.join(map(str, known))}"
    ]


def batch_norm_problems(config: PretrainConfig) -> list[str]:
    """Whether BatchNorm of the last stage has one value a group, which has no variance."""
    shrinks = {"imagenet": 32, "cifar": 8}[config.model.stem]  # each halving rounds up
    if config.model.bn_group_size > 1 or config.data.image_size > shrinks:
        return []
    if not is_known_without_torch(config.model.arch):
        return []
    return [
        f"model.bn_group_size 1: images of {config.data.image_size} pixels (data.image_size) end as 1 x 1 with "
        f"model.stem {config.model.stem}, one value a group, which has no variance; 2 is the smallest that works"
    ]


def engine_problems(config: PretrainConfig) -> list[str]:
    """What the chosen engine cannot do."""
    engine, problems = config.engine, []
    if engine.kind == "ddp" and engine.zero_stage:
        problems.append(f"engine.zero_stage {engine.zero_stage} needs engine.kind deepspeed; with ddp it is 0")
    if engine.kind == "deepspeed" and config.optim.precision in ("fp16", "fp64"):
        problems.append(
            f"optim.precision {config.optim.precision} does not work with engine.kind deepspeed; bf16 and fp32 do, "
            "and engine.kind ddp does all"
        )
    if engine.cuda_graphs and engine.compile == "off":
        problems.append("engine.cuda_graphs needs engine.compile model or step")
    return problems
