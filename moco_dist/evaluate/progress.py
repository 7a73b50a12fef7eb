"""A training of an evaluation, kept on disk while it goes on: weights, BatchNorm's statistics, momentum, curve.

The disk has to be one that all ranks see.
"""

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from moco_dist.config.source import what_is_computed
from moco_dist.evaluate.subject import Evaluation, FrozenEncoder, digest
from moco_dist.files import write_whole
from moco_dist.provenance import hash_of_list, key_of
from moco_dist.run.folder import RunFolder

Curve = list[dict[str, float]]


def progress_path(evaluation: Evaluation, kind: str, encoder: FrozenEncoder) -> Path:
    """A file whose name holds a hash of all that the training depends on.

    Args:
        evaluation: settings and images.
        kind: linear or finetune.
        encoder: what is trained, or on what; as it is before.
    """
    facts = [
        digest(encoder.module), str(encoder.dtype), evaluation.resize, evaluation.crop,
        hash_of_list(evaluation.train.paths),
        what_is_computed(evaluation.config),
    ]  # fmt: skip
    return RunFolder(evaluation.config.run_dir).progress(kind, encoder.name, key_of(facts))


def save_progress(path: Path, module: nn.Module, sgd: torch.optim.SGD, curve: Curve) -> None:
    """Write the file; it is complete whenever it is there."""
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        state = {key: value for key, value in sgd.state[parameter].items() if value is not None}
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
    write_whole(path, safetensors.torch.save(tensors, metadata={"curve": json.dumps(curve)}))


def load_progress(path: Path, module: nn.Module, sgd: torch.optim.SGD) -> Curve:
    """Fill module and SGD; returns the curve so far, empty where there is no such file or it is cut off."""
    try:
        file = safetensors.safe_open(path, "pt", device=str(next(module.parameters()).device))
    except (FileNotFoundError, safetensors.SafetensorError):
        return []
    with file:
        keys = set(file.keys())
        module.load_state_dict({name: file.get_tensor(name) for name in module.state_dict()})
        for name, parameter in module.named_parameters():
            if (key := f"{name}.momentum_buffer") in keys:
                # In the parameter's memory layout, as SGD makes it.
                buffer = torch.empty_like(parameter, requires_grad=False)
                sgd.state[parameter]["momentum_buffer"] = buffer.copy_(file.get_tensor(key))
        return json.loads(file.metadata()["curve"])
