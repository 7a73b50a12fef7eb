"""A training of an evaluation, kept on disk while it goes on: weights, BatchNorm's statistics, momentum, curve."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from moco_dist.evaluate.subject import write_atomically

Curve = list[dict[str, float]]


def save_progress(path: Path, module: nn.Module, sgd: torch.optim.SGD, curve: Curve) -> None:
    """Write the file; it is complete whenever it is there."""
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in sgd.state[parameter].items() if value is not None}
    write_atomically(path, safetensors.torch.save(tensors, metadata={"curve": json.dumps(curve)}))


def load_progress(path: Path, module: nn.Module, sgd: torch.optim.SGD) -> Curve:
    """Fill module and SGD; returns the curve so far, empty where there is no such file."""
    if not path.is_file():
        return []
    with safetensors.safe_open(path, "pt", device=str(next(module.parameters()).device)) as file:
        keys = set(file.keys())
        module.load_state_dict({name: file.get_tensor(name) for name in module.state_dict()})
        for name, parameter in module.named_parameters():
            if (key := f"{name}.momentum_buffer") in keys:
                sgd.state[parameter]["momentum_buffer"] = file.get_tensor(key)
        return json.loads(file.metadata()["curve"])
