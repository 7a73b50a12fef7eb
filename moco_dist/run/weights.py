"""Trained weights: those of a run, and those that come in from other programs (`moco-dist import`).

Inside, a backbone has the names of its library: torchvision's, timm's or the user's. What comes in is read as
safetensors or with `weights_only=True`, which runs no code of the file. `export.py` writes them for other programs.
"""

import io
import itertools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from moco_dist.config.architectures import ARCHITECTURES, family_of
from moco_dist.config.pretrain import ModelConfig, PretrainConfig
from moco_dist.config.source import to_yaml
from moco_dist.distributed.once import from_rank_0
from moco_dist.distributed.world import World
from moco_dist.errors import UserError, file_error, nearest
from moco_dist.files import write_whole
from moco_dist.method.backbone import build_backbone
from moco_dist.method.encoder import Encoder, build_encoder
from moco_dist.run import checkpoint
from moco_dist.run.folder import RunFolder

# What other programs put before the names of MoCo's query encoder, the most specific first.
PREFIXES = (
    "module.encoder_q.",  # the original release of MoCo, under DDP
    "encoder_q.0.",  # mmselfsup's forerunner OpenSelfSup: Sequential(backbone, neck)
    "encoder_q.",  # the same without DDP
    "module.backbone.",
    "model.backbone.",  # lightly's LightningModules that wrap a model
    "backbone.",  # lightly, mmselfsup, OpenMMLab's exports, ours
    "module.",
    "",
)
# What stands beside a backbone under the same prefix: classifiers and projection heads by their usual names.
HEADS = (
    "fc", "classifier", "head", "heads", "neck", "projector", "projection_head", "prediction_head", "predictor",
    "prototypes",
)  # fmt: skip
COUNTER = "num_batches_tracked"
STATE_KEYS = ("state_dict", "model", "model_state_dict")  # under which checkpoints keep their tensors
# lightly builds its backbone as Sequential(conv1, bn1, relu, maxpool, layer1, ..., layer4, avgpool).
LIGHTLY = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


@dataclass(frozen=True)
class Backbone:
    """A trained backbone.

    Attributes:
        tensors: the library's names (without the classifier) to float32 tensors on the CPU.
        model: what network it is; its head is of no matter here.
        step: optimiser steps behind it; 0 where unknown.
        left_out: what stood beside it, by the first parts of the names.
    """

    tensors: dict[str, Tensor]
    model: ModelConfig
    step: int
    left_out: tuple[str, ...] = ()


def backbone_of_run(run_dir: Path) -> Backbone:
    """The query encoder's backbone of a run's newest checkpoint, running statistics averaged over ranks.

    Raises:
        UserError: there is no run or no checkpoint.
    """
    encoder, config, step = trained_encoder(run_dir)
    tensors = {name: value.contiguous() for name, value in encoder.backbone.state_dict().items()}
    return Backbone(tensors, config.model, step)


def import_backbone(path: Path, arch: str, data_root: Path, run_dir: Path, stem: str = "imagenet") -> Backbone:
    """Make RUN of the backbone in `path`, so that every evaluation and export takes it as a run of ours.

    Args:
        path: see `read_backbone`.
        arch: see `read_backbone`.
        data_root: what the evaluations read by default.
        run_dir: folder to make; RUN/config.yaml has MoCo v2's settings beside the model and the data.
        stem: see `read_backbone`.

    Raises:
        UserError: `run_dir` is not empty, or the file does not fit.
    """
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty; give another --out")
    backbone = read_backbone(path, arch, stem)
    config = PretrainConfig.model_validate(
        {"run": {"dir": run_dir}, "data": {"root": data_root}, "model": backbone.model.model_dump()}
    )
    save(backbone.tensors, RunFolder(run_dir).backbone, {"step": "0", "arch": arch, "imported_from": path.name})
    write_whole(RunFolder(run_dir).config, to_yaml(config).encode())
    return backbone


def imported_from(run_dir: Path) -> str:
    """The name of the file that `import_backbone` took; "" for a run that was trained here."""
    try:
        with safetensors.safe_open(RunFolder(run_dir).backbone, "pt") as file:
            return (file.metadata() or {}).get("imported_from", "")
    except (OSError, safetensors.SafetensorError):
        return ""


def load_trained(encoder: nn.Module, run_dir: Path, world: World | None = None) -> int:
    """Fill a query encoder from a run's newest checkpoint, or the backbone alone where it was imported.

    Args:
        encoder: what to fill.
        run_dir: RUN.
        world: this process, if all ranks call it; None: this process alone.

    Returns:
        the optimiser steps behind it.

    Raises:
        UserError: there is neither, or it does not fit.
    """
    world, run = world or World(), RunFolder(run_dir)
    imported = run.backbone

    def newest() -> str:
        has_one = checkpoint.complete_checkpoints(run_dir) or not imported.is_file()
        return checkpoint.latest(run_dir).name if has_one else ""

    if name := from_rank_0(newest, world):
        return checkpoint.load_query_encoder(encoder, run.checkpoints / name, world)
    content = from_rank_0(lambda: _read(imported), world)
    tensors = {f"backbone.{name}": value for name, value in content.items()}
    wanted = {name: value for name, value in encoder.state_dict().items() if name.startswith("backbone.")}
    if problem := _problem(tensors, wanted):
        raise UserError(f"{imported} does not fit the model of {RunFolder(run_dir).config}: {problem}")
    encoder.load_state_dict(tensors, strict=False)
    return 0


def trained_encoder(run_dir: Path) -> tuple[Encoder, PretrainConfig, int]:
    """A run's query encoder as `load_trained` fills it, the run's settings, and the optimiser steps behind it."""
    config = RunFolder(run_dir).settings()
    encoder = build_encoder(config.model, config.run.seed, config.data.image_size)
    return encoder, config, load_trained(encoder, run_dir)


def save(content: Any, out: Path, metadata: dict[str, str]) -> None:
    """Write a file, whole or not at all: safetensors with `metadata`, torch's own format, or bytes as they are.

    Raises:
        UserError: it cannot be written.
    """
    if isinstance(content, bytes):
        packed = content
    elif out.suffix == ".safetensors":
        packed = safetensors.torch.save(content, metadata={"format": "pt", **metadata})
    else:
        torch.save(content, file := io.BytesIO())
        packed = file.getvalue()
    try:
        write_whole(out, packed)  # the libraries' own writers call a full disk neither OSError nor by its name
    except OSError as error:
        raise file_error(f"{out} cannot be written: {(error.strerror or str(error)).lower()}", error) from error


def read_backbone(path: Path, arch: str, stem: str = "imagenet") -> Backbone:
    """The backbone in a file of another program: MoCo's original release, lightly, mmselfsup, torchvision or ours.

    Every tensor of the network has to be in the file, and the file has to have no other one beside those of a head.

    Args:
        path: `.pth`, `.pth.tar`, `.ckpt` or `.safetensors`.
        arch: as in `model.arch`.
        stem: as in `model.stem`.

    Raises:
        UserError: the file cannot be read safely, is not exactly such a backbone, or a weight is no number.
    """
    try:
        family_of(arch)
    except UserError as error:
        raise UserError(f"--arch {error}") from error
    stems = get_args(ModelConfig.model_fields["stem"].annotation)
    if stem not in stems:
        raise UserError(f"--stem {stem!r} is not one of {', '.join(stems)}{nearest(stem, stems)}")
    content = _read(path)
    found = _named_tensors(content)
    if not found:
        keys = ", ".join(map(str, itertools.islice(content, 8))) or "nothing"
        raise UserError(f"{path} has no tensors, neither by their names nor under {', '.join(STATE_KEYS)}; it holds "
                        f"{keys}; save the network's state dict alone")  # fmt: skip
    return backbone_among(found, path, arch, stem)


def backbone_among(found: dict[str, Tensor], path: Path, arch: str, stem: str) -> Backbone:
    """The backbone among the tensors of `path`; see `read_backbone`."""
    wanted = _wanted(arch, stem)
    # A prefix that no name has would leave nothing to speak of; where none fits, the one under which most fits is it.
    under = {prefix: _under(prefix, found, wanted) for prefix in PREFIXES}
    prefix = min(PREFIXES, key=lambda prefix: len(wanted.keys() - under[prefix]))
    tensors = under[prefix]
    if problem := _problem(tensors, wanted):
        raise UserError(f"{path} holds no {arch}: {problem}; {_advice(tensors, arch, stem)}")
    kept = {}
    for name, value in wanted.items():
        given = tensors[name]
        if given.layout != torch.strided or given.is_quantized or given.is_meta:
            raise UserError(f"{path} cannot be used: {name} is sparse, quantised or without values; save plain tensors")
        if value.is_floating_point() and not (given.is_floating_point() and given.float().isfinite().all()):
            raise UserError(f"{path} cannot be used: {name} has values that are not finite numbers of floating point")
        kept[name] = given.to(value.dtype).contiguous()  # it may be channels-last
    kept |= {f"{name[:-12]}num_batches_tracked": torch.tensor(0) for name in wanted if "running_mean" in name}
    model = ModelConfig.model_validate({"arch": arch, "stem": stem})
    return Backbone(kept, model, 0, _beside(prefix, found, wanted))


def _wanted(arch: str, stem: str) -> dict[str, Tensor]:
    """What a backbone consists of, as tensors without memory; BatchNorm's counters left out."""
    with torch.device("meta"):
        backbone, _ = build_backbone(ModelConfig.model_validate({"arch": arch, "stem": stem}))
    return {name: value for name, value in backbone.state_dict().items() if not name.endswith(COUNTER)}


def _under(prefix: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below a prefix by the names of `wanted`, without those of a head and BatchNorm's counters."""
    below = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    named = {name if name in wanted else _torchvision_name(name): value for name, value in below.items()}
    return {
        k: v for k, v in named.items() if k in wanted or (k.partition(".")[0] not in HEADS and not k.endswith(COUNTER))
    }


def _beside(prefix: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[str, ...]:
    """What else there is, such as module.encoder_k and module.encoder_q.fc; sorted."""
    depth, left_out = prefix.count(".") or 1, set()
    for name in found:
        below = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if below in wanted or _torchvision_name(below) in wanted or name.endswith(COUNTER):
            continue
        parts = depth if not below or not prefix else depth + 1
        left_out.add(".".join(name.split(".")[:parts]))
    return tuple(sorted(left_out))


def _problem(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """The first difference between the tensors and those that are wanted, or ""."""
    for name, value in wanted.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != value.shape:
            return f"{name} has the shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
    return next((f"{name} has no place in it" for name in tensors if name not in wanted), "")


def _advice(tensors: dict[str, Tensor], arch: str, stem: str) -> str:
    """What to do with a file that does not fit."""
    first = tensors.get("conv1.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != 3:
        if first.shape[1] != 1:
            return f"images here have 3 channels, and it takes {first.shape[1]}"
        how = 'state["conv1.weight"].repeat(1, 3, 1, 1) / 3'
        coloured = {**tensors, "conv1.weight": first.expand(-1, 3, -1, -1)}
        more = f"; then {_fitting(coloured, arch, stem)}" if _problem(coloured, _wanted(arch, stem)) else ""
        return f"images here have 3 channels; {how} in its place computes the same on gray ones{more}"
    return _fitting(tensors, arch, stem)


def _fitting(tensors: dict[str, Tensor], arch: str, stem: str) -> str:
    """The flags with which the tensors fit."""
    stems = get_args(ModelConfig.model_fields["stem"].annotation)
    for other_arch, other_stem in itertools.product(ARCHITECTURES, stems):
        if not _problem(tensors, _wanted(other_arch, other_stem)):
            flags = [f"--arch {other_arch}"] * (other_arch != arch) + [f"--stem {other_stem}"] * (other_stem != stem)
            return f"with {' '.join(flags)} it fits"
    return (
        f"no --arch of {', '.join(ARCHITECTURES)} with --stem {' or '.join(stems)} fits either; another network of "
        "torchvision or timm is --arch torchvision:NAME or timm:NAME"
    )


def _torchvision_name(name: str) -> str:
    first, dot, rest = name.partition(".")
    return LIGHTLY.get(first, first) + dot + rest


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the age of a file's format
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise file_error(f"{path} cannot be read: {(error.strerror or str(error)).lower()}", error) from error
    except Exception as error:  # on a damaged or hostile file torch raises anything
        raise UserError(f"{path} cannot be read as weights alone, without running code of it: {_why(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a dict of tensors is expected")
    return content


def _why(error: Exception) -> str:
    """The reason in torch's words, which come with ways around it, terminal codes and links."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)) or type(error).__name__
    if named := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return (
            f"it holds {named[1]}, which is no tensor; if you trust the file, save its state dict alone: loaded = "
            "torch.load(FILE, weights_only=False), then torch.save(loaded['state_dict'], NEW), or loaded.state_dict() "
            "where it is a whole network"
        )
    text = text.partition("WeightsUnpickler error:")[2] or text
    return text.strip().splitlines()[0]


def _named_tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    for key in STATE_KEYS:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    # torch.compile puts its prefix wherever a compiled module begins.
    return {str(k).replace("_orig_mod.", ""): value for k, value in content.items() if isinstance(value, Tensor)}
