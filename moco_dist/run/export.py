"""Weights that go out to other programs: `moco-dist export`.

Inside, a backbone has the names of its library: torchvision's, timm's or the user's. Files are safetensors, torch's own
format where the other program asks for it, or ONNX; none of them holds code.
"""

import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from moco_dist.config.architectures import ARCHITECTURES, family_of
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.errors import UserError, nearest
from moco_dist.method.backbone import classifier_of, of_torchvision
from moco_dist.method.encoder import Encoder
from moco_dist.run.model_card import model_card
from moco_dist.run.weights import save, trained_encoder

LARGEST_ONNX_BYTES = 2**31 - 2**20  # protobuf's limit for one file, less the graph


@dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
        run_dir: folder of the run.
        encoder: query encoder in evaluation mode, running statistics averaged over ranks.
        config: settings of the run.
        step: optimiser steps behind it; 0 for an imported one.
    """

    run_dir: Path
    encoder: Encoder
    config: PretrainConfig
    step: int

    def backbone(self) -> dict[str, Tensor]:
        """The backbone's tensors by the names of its library."""
        return _plain(self.encoder.backbone.state_dict())

    def facts(self) -> dict[str, str]:
        """What a file of tensors says of them."""
        return {"step": str(self.step), "arch": self.config.model.arch}


def export_run(run_dir: Path, format: str, out: Path) -> str:
    """Write a run's query encoder for another program.

    `torchvision` and `timm` load with `strict=True` into a network without classifier; `huggingface` is a folder that
    timm and transformers load, with a model card; `onnx` is the backbone as a graph; `detectron2` has its ResNet's
    names; `safetensors` is the whole encoder, head included, under this program's names.

    Args:
        run_dir: folder of the run.
        format: one of FORMATS.
        out: file to write, replaced only when the new one is complete; for `huggingface` a folder, new or empty.

    Returns:
        a line of Python that loads it.

    Raises:
        UserError: an unknown format, another file ending, no checkpoint, or the other program has no such network.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is not one of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    ending, write = FORMATS[format]
    if ending and out.suffix != ending:
        raise UserError(f"--out {out}: a file for {format} ends in {ending}")
    if not ending and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise UserError(f"--out {out} is there already; {format} is a folder, new or empty")
    encoder, config, step = trained_encoder(run_dir)
    return write(Trained(run_dir, encoder.eval(), config, step), out)


def _to_torchvision(trained: Trained, out: Path) -> str:
    model = trained.config.model
    family, name = family_of(model.arch)
    if family not in ("", "torchvision") or model.stem != "imagenet":
        raise _has_no("torchvision", trained)
    save(trained.backbone(), out, {})
    how = f"model.load_state_dict(torch.load({str(out)!r}, weights_only=True), strict=True)"
    if family:
        head = classifier_of(of_torchvision(name), model.arch)
        taken_out = f"model.set_submodule({head!r}, torch.nn.Identity())"
        return f"model = torchvision.models.get_model({name!r}); {taken_out}; {how}"
    is_own = not hasattr(torchvision.models, name)
    own = "ResNet(torchvision.models.resnet.{block}, {layers})".format(**ARCHITECTURES[name])
    return f"model = torchvision.models.{own if is_own else f'{name}()'}; model.fc = torch.nn.Identity(); {how}"


def _to_timm(trained: Trained, out: Path) -> str:
    name, arguments = _timms_name("timm", trained)
    save(trained.backbone(), out, trained.facts())
    more = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({name!r}, num_classes=0{more}, checkpoint_path={str(out)!r})"


def _to_huggingface(trained: Trained, out: Path) -> str:
    """README.md, config.json as timm has it on the hub, and model.safetensors, which is written last.

    timm's own config is the one that both read: transformers wraps timm for it, so that one folder serves any network
    that timm has, where transformers' own ResNet would serve four.
    """
    name, arguments = _timms_name("huggingface", trained)
    augment, crop = trained.config.augment, trained.config.data.image_size
    # timm resizes the short side to floor(crop / crop_pct); rounded down, that is what the evaluations resize to.
    crop_pct = math.floor(1e6 * crop / round(crop * 8 / 7)) / 1e6
    theirs = getattr(trained.encoder.backbone, "pretrained_cfg", {"first_conv": "conv1", "classifier": "fc"})
    config = {
        "architecture": name, "num_classes": 0, "num_features": trained.encoder.feature_dim, "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, crop, crop], "fixed_input_size": False, "interpolation": "bilinear",
            "crop_pct": crop_pct, "crop_mode": "center", "mean": list(augment.mean), "std": list(augment.std),
            "num_classes": 0, "first_conv": theirs["first_conv"], "classifier": theirs["classifier"],
        },
    }  # fmt: skip
    how = f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"
    also = f"transformers.AutoModel.from_pretrained({str(out)!r})"
    header = (
        "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\ntags: [self-supervised, contrastive]\n---\n"
    )
    loads = [f"timm.create_model('local-dir:{out.name}', pretrained=True)  # (N, 3, S, S) to (N, D)",
             "timm.data.create_transform(**timm.data.resolve_data_config(model=model))  # of an image",
             f"transformers.AutoModel.from_pretrained('{out.name}')(images).pooler_output"]  # fmt: skip
    card = model_card(trained.run_dir, trained.config, trained.step, loads)
    save((header + card).encode(), out / "README.md", {})
    save(json.dumps(config, indent=1).encode(), out / "config.json", {})
    save(trained.backbone(), out / "model.safetensors", trained.facts())
    return f"{how}  # or {also}"


def _to_onnx(trained: Trained, out: Path) -> str:
    """The backbone's graph for any batch of images of the run's size, with what normalises them in its metadata."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx: {error}; install it by pip install 'moco_dist[export]'") from error
    backbone, config, size = trained.encoder.backbone, trained.config, trained.config.data.image_size
    if (count := sum(value.nbytes for value in backbone.state_dict().values())) > LARGEST_ONNX_BYTES:
        raise UserError(
            f"--format onnx: {config.model.arch} has {count:,} bytes of weights; a file of ONNX holds "
            f"{LARGEST_ONNX_BYTES:,} at most"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            program = torch.onnx.export(
                backbone, (torch.zeros(2, 3, size, size),), dynamo=True, verbose=False, input_names=["images"],
                output_names=["features"], dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except Exception as error:  # of torch's exporter: whatever is in a network that it does not take
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--format onnx: torch's exporter does not take {config.model.arch}: {reason}") from error
    assert program is not None
    facts = {"mean": list(config.augment.mean), "std": list(config.augment.std), "moco_dist": trained.facts()}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    save(program.model_proto.SerializeToString(), out, {})
    shape = f"float32 (N, 3, {size}, {size})"
    return f"onnxruntime.InferenceSession({str(out)!r}).run(['features'], {{'images': images}})  # {shape}"


def _to_detectron2(trained: Trained, out: Path) -> str:
    if not _is_plain_resnet(trained) or not hasattr(torchvision.models, family_of(trained.config.model.arch)[1]):
        raise _has_no("detectron2", trained)
    # Where a file says so, detectron2 matches names by their longest common endings: any prefix of its models fits.
    renamed = {to_detectron2(name): value for name, value in trained.backbone().items() if "num_batches" not in name}
    save({"model": renamed, "matching_heuristics": True, "__author__": "moco_dist"}, out, {})
    return f"MODEL.WEIGHTS {out}  with MODEL.RESNETS.STRIDE_IN_1X1 False, and PIXEL_MEAN and PIXEL_STD in RGB"


def _to_safetensors(trained: Trained, out: Path) -> str:
    save(_plain(trained.encoder.state_dict()), out, trained.facts())
    return f"safetensors.torch.load_file({str(out)!r})  # backbone.* with torchvision's names, head.*"


FORMATS: dict[str, tuple[str, Callable[[Trained, Path], str]]] = {
    "torchvision": (".pth", _to_torchvision),
    "timm": (".safetensors", _to_timm),
    "huggingface": ("", _to_huggingface),
    "onnx": (".onnx", _to_onnx),
    "detectron2": (".pth", _to_detectron2),
    "safetensors": (".safetensors", _to_safetensors),
}  # and the ending of their files; "" for a folder


def to_detectron2(name: str) -> str:
    """A ResNet's tensor by torchvision's name, to detectron2's: stem.conv1, res2.0.conv1.norm, res2.0.shortcut."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _timms_name(format: str, trained: Trained) -> tuple[str, dict[str, Any]]:
    """What timm calls the network, and the arguments that make it of that.

    Raises:
        UserError: timm has none with these names of tensors.
    """
    family, name = family_of(trained.config.model.arch)
    if family == "timm":
        backbone = trained.encoder.backbone
        if not getattr(backbone, "dynamic_img_size", False):
            return name, {}
        # A vision transformer that resamples its position embeddings: from the size they are of, and only once.
        return name, {"dynamic_img_size": True, "img_size": list(backbone.patch_embed.img_size)}  # type: ignore
    if not _is_plain_resnet(trained):
        raise _has_no(format, trained)
    if hasattr(torchvision.models, name):
        return name, {}
    own = ARCHITECTURES[name]  # a ResNet-18 or ResNet-50 of another depth
    return {"BasicBlock": "resnet18", "Bottleneck": "resnet50"}[own["block"]], {"layers": own["layers"]}


def _is_plain_resnet(trained: Trained) -> bool:
    """Whether it is torchvision's ResNet as it is there: timm has its tensors under the same names."""
    model, is_resnet = trained.config.model, isinstance(trained.encoder.backbone, torchvision.models.ResNet)
    return is_resnet and model.stem == "imagenet" and family_of(model.arch)[0] in ("", "torchvision")


def _has_no(format: str, trained: Trained) -> UserError:
    model = trained.config.model
    return UserError(
        f"{format} has no {model.arch} with the {model.stem} stem; --format safetensors and onnx have no such limit"
    )


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}
