"""Batches are copied to a GPU while the step before computes: on a GPU, and where its streams are emulated."""

import dataclasses
import threading

import pytest
import torch

from moco_dist.data.batch import CropBatch
from moco_dist.data.transfer import on_device

TENSORS = [f.name for f in dataclasses.fields(CropBatch) if f.name != "replaced"]
GPU = torch.device("cuda", 0)


def batch_of(number):
    tensors = {name: torch.full((2, 3), number) for name in TENSORS}
    return CropBatch(**tensors, replaced=(str(number),))


def loader(count, asked):
    """Batches 0, 1, ...; notes which one is asked for."""
    try:
        for number in range(count):
            asked.append(number)
            yield batch_of(number)
    finally:
        asked.append("closed")


class Streams:
    """CUDA's streams as lists of what each of them was given."""

    def __init__(self, monkeypatch):
        self.given = {"compute": [], "copy": []}
        self.copied = [threading.Event() for _ in range(9)]
        self.kept = []
        self.on = threading.local()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "copy"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(self, self.current))
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(CropBatch, "to", lambda batch, device: self.copy(batch, device))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: self.keep(x, stream))

    @property
    def current(self):
        return getattr(self.on, "name", "compute")

    def entered(self, stream):
        streams = self

        class Entered:
            def __enter__(self):
                streams.on.name = stream.name

            def __exit__(self, *_):
                streams.on.name = "compute"

        return Entered()

    def keep(self, tensor, stream):
        self.kept.append((int(tensor[0, 0]), stream.name))

    def copy(self, batch, device):
        assert device == GPU
        number = int(batch.view_q[0, 0])
        self.given[self.current].append(("copy", number))
        self.copied[number].set()
        return batch


@dataclasses.dataclass
class Stream:
    streams: Streams
    name: str

    def record_event(self):
        return self.streams.given[self.name][-1]

    def wait_event(self, event):
        self.streams.given[self.name].append(("wait", event))


def test_the_next_batch_is_copied_while_a_step_computes(monkeypatch):
    streams, asked = Streams(monkeypatch), []
    arriving = on_device(loader(4, asked), GPU)
    for number in range(3):
        batch = next(arriving)
        assert batch.replaced == (str(number),)
        # The step is prepared now, and the next batch is copied without being asked for.
        assert streams.copied[number + 1].wait(60)
        # The compute stream waits for this batch's copy alone, and every tensor of it is kept for that stream.
        assert streams.given["compute"] == [("wait", ("copy", n)) for n in range(number + 1)]
        assert streams.kept[-len(TENSORS) :] == [(number, "compute")] * len(TENSORS)
    assert next(arriving).replaced == ("3",)
    assert next(arriving, None) is None
    assert streams.given["copy"] == [("copy", n) for n in range(4)]


def test_at_most_two_batches_are_ahead_and_the_loader_is_closed(monkeypatch):
    streams, asked = Streams(monkeypatch), []
    arriving = on_device(loader(9, asked), GPU)
    next(arriving)
    assert streams.copied[2].wait(60)
    arriving.close()
    assert asked == [0, 1, 2, "closed"]


def test_a_loader_s_error_comes_through(monkeypatch):
    Streams(monkeypatch)

    def broken():
        yield batch_of(0)
        raise OSError("gone")

    arriving = on_device(broken(), GPU)
    next(arriving)
    with pytest.raises(OSError, match="gone"):
        next(arriving)


def test_on_a_cpu_nothing_is_made_ahead():
    asked = []
    arriving = on_device(loader(3, asked), torch.device("cpu"))
    next(arriving)
    assert asked == [0]
    arriving.close()
    assert asked == [0, "closed"]


@pytest.mark.gpu
def test_on_a_gpu_every_batch_arrives_whole_before_it_is_used():
    """Large copies beside a busy compute stream: a batch that was used too early would hold another's numbers."""

    def pinned(count):
        for number in range(count):
            tensors = {name: torch.full((1 << 22,), number).pin_memory() for name in TENSORS}
            yield CropBatch(**tensors, replaced=())

    work = torch.randn(4096, 4096, device=GPU)
    sums = []
    for batch in on_device(pinned(8), GPU):
        work @ work
        sums.append(torch.stack([getattr(batch, name).float().mean() for name in TENSORS]))
        del batch
    assert torch.stack(sums).tolist() == [[float(number)] * len(TENSORS) for number in range(8)]
