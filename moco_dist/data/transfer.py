"""Batches on the GPU before they are needed: copied while the step before computes."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch

from moco_dist.data.ahead import ahead
from moco_dist.data.batch import CropBatch


def on_device(
    batches: Generator[CropBatch, None, None], device: torch.device, must_end: Callable[[], bool] = lambda: False
) -> Generator[CropBatch, None, None]:
    """The same batches on `device`, in order. Close it; `batches` is closed along with it.

    A GPU copies on a stream of its own, told by a thread of its own, up to two batches ahead: neither the steps that
    are under way nor the host that prepares them wait for a copy. On the default stream, a copy would begin after all
    steps that the host has prepared. Who takes a batch may use it on its current stream at once.

    Args:
        batches: in pinned memory, or on the GPU.
        device: where they go.
        must_end: as in `ahead`.
    """
    if device.type != "cuda":
        with contextlib.closing(batches):
            for batch in batches:
                yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)

    def copied() -> Generator[tuple[CropBatch, Any], None, None]:
        with contextlib.closing(batches):
            for batch in batches:
                with torch.cuda.stream(stream):  # for the copies alone: what is taken from a loader has its own streams
                    moved = batch.to(device)
                yield moved, stream.record_event()

    with contextlib.closing(ahead(copied(), 1, must_end)) as arriving:
        for batch, arrived in arriving:
            current = torch.cuda.current_stream(device)
            current.wait_event(arrived)
            batch.record_stream(current)  # its memory is the other stream's, which may give it to the next batch
            yield batch
