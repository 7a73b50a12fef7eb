"""How fast, not what: cuDNN's and TF32's switches, torch.compile and CUDA graphs (the config section `engine`)."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from moco_dist.config import EngineConfig

Function = TypeVar("Function", bound=Callable)


def set_backends(config: EngineConfig) -> None:
    """CuDNN's choice of algorithms and TF32, as the config says, whatever torch's defaults are. For this process."""
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32


def compile_options(config: EngineConfig) -> dict[str, Any]:
    """Of `torch.compile` for an encoder, with CUDA graphs if the config asks for them.

    Shapes never change in a run: the last batch of an epoch is a whole one.
    """
    return {"dynamic": False, "mode": "reduce-overhead" if config.cuda_graphs else None}


def compiled_on_gpu(function: Function, config: EngineConfig, device: str) -> Function:
    """`function` compiled under `engine.compile: step` on a GPU, else as it is: a CPU is faster leaving out work."""
    if config.compile != "step" or device == "cpu":
        return function
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]
