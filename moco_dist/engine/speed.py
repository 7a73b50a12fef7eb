"""How fast, not what: cuDNN's and TF32's switches, torch.compile and CUDA graphs (the config section `engine`)."""

import ctypes
import platform
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from moco_dist.config.pretrain import EngineConfig

Function = TypeVar("Function", bound=Callable)


def set_backends(config: EngineConfig) -> None:
    """Set cuDNN's choice of algorithms and TF32 for this process as the config says, whatever torch's defaults are."""
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    # torch 2.11's compiler advises otherwise
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)


def keep_freed_memory(device: str) -> None:
    """On a CPU with glibc, have this process keep the memory of a step's activations for the next step's.

    By default glibc gives each large block back to the kernel, which clears the pages of every new one.
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, -1)  # never
        ctypes.CDLL(None).mallopt(mmap_max, 0)


def compile_options(config: EngineConfig) -> dict[str, Any]:
    """Options of `torch.compile` for an encoder, with CUDA graphs if the config asks for them.

    Shapes never change in a run: the last batch of an epoch is a whole one.
    """
    return {"dynamic": False, "mode": "reduce-overhead" if config.cuda_graphs else None}


def compiled_on_gpu(function: Function, config: EngineConfig, device: str) -> Function:
    """`function`, compiled under `engine.compile: step` on a GPU; a CPU is faster if it leaves out work."""
    if config.compile != "step" or device == "cpu":
        return function
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]
