"""Which dtype the encoders compute in."""

import contextlib

import torch


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """The dtype of `optim.precision`; `auto` is bf16 on GPUs that have it, fp16 on others, fp32 on the CPU."""
    if precision == "auto":
        if device == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    return names[precision]


def slow_on_cpu(dtype: torch.dtype, device: str) -> str:
    """A warning where fp16 is computed on a CPU, which has no instructions for it; else ""."""
    if dtype != torch.float16 or torch.device(device).type != "cpu":
        return ""
    return "warning: fp16 on a CPU is many times slower than fp32 and saves nothing; precision fp32 is meant for it"


def autocast(dtype: torch.dtype, device: str) -> contextlib.AbstractContextManager:
    """Autocast to a 16-bit dtype. For another dtype it does nothing: the weights have that dtype themselves."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)
