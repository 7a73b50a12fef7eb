"""Weights that a pre-training begins with instead of random ones: `model.init`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from moco_dist.config.architectures import TIMM, missing_start
from moco_dist.config.pretrain import ModelConfig, PretrainConfig
from moco_dist.distributed.collectives import broadcast_in_place
from moco_dist.distributed.once import from_rank_0
from moco_dist.distributed.world import World
from moco_dist.errors import UnreachableError, UserError
from moco_dist.method.backbone import of_timm
from moco_dist.method.step import Method
from moco_dist.run.weights import COUNTER, Backbone, backbone_among, backbone_of_run, read_backbone


def begin_with_weights(method: Method, config: PretrainConfig, world: World) -> list[str]:
    """Give every encoder of a method at step 0 the backbone that `model.init` names. Called by all ranks.

    The heads stay as the seed has drawn them.

    Returns:
        a line for a person: what was taken, and what was left out; none where `model.init` is not given.

    Raises:
        UserError: see `fill`.
    """
    source = config.model.init
    if source is None:
        return []
    backbones = [encoder.get_submodule("backbone") for encoder in method.encoders.values()]
    try:
        found = fill(backbones, source, config.model, world)
    except UserError as error:
        told = str(error).replace(" --arch", " --model.arch").replace(" --stem", " --model.stem")
        raise type(error)(f"model.init {told}") from error
    # An engine may hold the weights a second time, and takes them over as it does when a checkpoint was loaded.
    method.engine.load_optimizer_tensors(method.engine.optimizer_tensors())
    after = f" after {found.step} steps" if found.step else ""
    count, left_out = len(_weights(backbones[0])), ", ".join(found.left_out) or "nothing"
    return [f"begins with the weights of {source}{after}: all {count} tensors of the backbone were there and fit; left "
            f"out: {left_out}; the head is drawn by the seed"]  # fmt: skip


def fill(backbones: Sequence[nn.Module], source: Path, model: ModelConfig, world: World) -> Backbone:
    """Fill backbones with the weights of `source`. Called by all ranks: rank 0 reads, and sends them to the others.

    Args:
        backbones: networks of `model`; they get equal weights and running statistics.
        source: a file that `read_backbone` takes, the folder of a run, or timm:NAME for weights that timm downloads.
        model: what network it has to be.
        world: this process.

    Returns:
        what was found, without its tensors.

    Raises:
        UserError: on all ranks; it cannot be read safely, is not exactly such a backbone, or a weight is no number.
        UnreachableError: timm's weights cannot be downloaded.
    """
    tensors: dict[str, Tensor] = {}

    def read() -> Backbone:
        found = _read(source, model)
        tensors.update(found.tensors)
        return replace(found, tensors={})

    found = from_rank_0(read, world)
    first, *others = map(_weights, backbones)
    for name, weight in first.items():
        if world.is_main:
            weight.copy_(tensors[name])
        broadcast_in_place(weight, 0, world)
        for other in others:
            other[name].copy_(weight)
    return found


def _weights(backbone: nn.Module) -> dict[str, Tensor]:
    """The live tensors of a backbone, but for BatchNorm's counters."""
    return {name: value for name, value in backbone.state_dict().items() if not name.endswith(COUNTER)}


def _read(source: Path, model: ModelConfig) -> Backbone:
    if str(source).startswith(TIMM):
        found = _of_timm(str(source))
    elif source.is_dir():
        found = backbone_of_run(source)
        found = replace(found, left_out=("head",) if found.step else ())
    elif missing := missing_start(source):
        raise UserError(missing)
    else:
        return read_backbone(source, model.arch, model.stem)
    its = backbone_among(found.tensors, source, model.arch, model.stem)
    return replace(its, step=found.step, left_out=found.left_out)


def _of_timm(source: str) -> Backbone:
    """Timm's own weights, which it reads from its cache or downloads; as weights alone, whatever their format."""
    try:
        network = of_timm(source.removeprefix(TIMM), source, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # of timm, the hub's client or what that sends its requests by
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = UserError if isinstance(error, RuntimeError) else UnreachableError
        raise kind(f"{source} cannot be had: {reason}") from error
    return Backbone(network.state_dict(), ModelConfig.model_validate({"arch": source}), 0)
