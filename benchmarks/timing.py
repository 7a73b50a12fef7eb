"""Timing that a busy machine does not bend: alternatives take turns within one run, medians are compared."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronise(device: str) -> None:
    """Wait for the device's queued work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def in_turn(alternatives: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each, after one call that is not counted; each repeat calls every one once."""
    readings: dict[str, list[float]] = {name: [] for name in alternatives}
    for repeat in range(repeats + 1):
        for name, function in alternatives.items():
            seconds = seconds_of(function, device)
            if repeat:
                readings[name].append(seconds)
    return {name: statistics.median(values) for name, values in readings.items()}


def bytes_per_second(device: str = "cpu", megabytes: int = 512) -> float:
    """Measured memory bandwidth: bytes read plus bytes written, a second, of y <- y + x on large arrays.

    In place, as updates of weights are: what a plain copy overwrites, a CPU may read first, which nobody counts.
    """
    x = torch.randn(megabytes * 2**18, device=device)
    y = torch.zeros_like(x)
    return 3 * x.nbytes / in_turn({"add": lambda: y.add_(x)}, 7, device)["add"]


def flops_per_second(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured rate of a large matrix product: two FLOPs for each multiplication and addition."""
    size = size or (8192 if torch.device(device).type == "cuda" else 2048)
    a = torch.randn(size, size, device=device, dtype=dtype)  # ones take less power: a GPU is faster
    return 2 * size**3 / in_turn({"product": lambda: a @ a}, 7, device)["product"]
