"""A step of the method on crops of noise, on one rank alone: for whatever times a step without data and network."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import counter_rng
from moco_dist.data.batch import CropBatch
from moco_dist.data.colours import apply_colours, draw_colours
from moco_dist.data.views import Views
from moco_dist.distributed.world import World
from moco_dist.engine import Engine
from moco_dist.engine.speed import compiled_on_gpu
from moco_dist.method.build import build_method

WARM_UP_STEPS = 2


class RandomStep:
    """A step as `train.pretrain` makes it: the colours of both views, then `train_step`.

    The loss is N x K work, as much as a rank's of several, which share the queue.

    Attributes:
        config: of the run, with `local_batch` as its whole batch.
        method: what the step is of.
    """

    def __init__(self, config: PretrainConfig, local_batch: int, device: str) -> None:
        values = config.model_dump(mode="json")
        values["optim"]["global_batch_size"] = local_batch
        self.config = PretrainConfig.model_validate(values)
        self._device = device
        self.method = build_method(self.config, World(device=device))
        self._colour = compiled_on_gpu(apply_colours, config.engine, device)
        self._random = _random_batch(self.config).to(torch.device(device))
        self._order = torch.randperm(local_batch).to(device)

    def step(self, batch: CropBatch | None = None, marks: "Marks | None" = None) -> None:
        """One step, of random crops if no others are given; its parts are added to `marks`."""
        batch, method = batch or self._random, self.method
        with marks.part("colours") if marks else nullcontext():
            query = self._colour(batch.view_q, batch.colours_q, self.config.augment, method.dtype)
            key = self._colour(batch.view_k, batch.colours_k, self.config.augment, method.dtype)
        engine = method.engine
        method.engine = cast(Engine, marks) if marks else engine
        method.train_step(Views(query, key, self._order), 0.0, monitored=False)
        method.engine = engine

    def seconds_of_one(self) -> float:
        """Seconds of one step, until the device has done it."""
        started = time.perf_counter()
        self.step()
        synchronise(self._device)
        return time.perf_counter() - started

    def seconds(self, steps: int) -> float:
        """Median seconds of `steps` steps after the warm-up; the device is waited for after each."""
        readings = [self.seconds_of_one() for _ in range(WARM_UP_STEPS + steps)]
        return statistics.median(readings[WARM_UP_STEPS:])

    def seconds_of_parts(self, marks: "Marks", rest: str) -> dict[str, float]:
        """Seconds of one step by part, the device being waited for between them; `rest` is the name of what is left."""
        started = marks.now()
        self.step(marks=marks)
        elapsed = marks.now() - started
        return {**marks.seconds, rest: elapsed - sum(marks.seconds.values())}

    def marks(self) -> "Marks":
        """New marks for one step."""
        return Marks(self.method.engine, self._device)


class Marks:
    """The engine, with the seconds of its parts."""

    def __init__(self, engine: Any, device: str) -> None:
        self._engine, self._device = engine, device
        self.seconds: dict[str, float] = {}

    def __call__(self, images: Tensor, synchronise: bool = True) -> Tensor:
        with self.part("query forward"):
            return self._engine(images, synchronise=synchronise)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        with self.part("backward"):
            self._engine.backward(loss)

    def step(self, lr: float, monitored: bool = False) -> dict[str, Tensor]:
        """See `Engine`."""
        with self.part("optimiser"):
            return self._engine.step(lr, monitored)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def now(self) -> float:
        """The time when the device has done all that it was given."""
        synchronise(self._device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds inside to a part."""
        started = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def _random_batch(config: PretrainConfig) -> CropBatch:
    """Crops of noise, with colours as step 0 draws them."""
    count, side = config.optim.global_batch_size, config.data.image_size
    crops = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    samples = np.arange(count)
    colours_q, colours_k = (
        draw_colours(config.augment, config.run.seed, 0, samples, stream)
        for stream in (counter_rng.STREAM_COLOUR_Q, counter_rng.STREAM_COLOUR_K)
    )
    in_order = torch.from_numpy(samples)
    return CropBatch(crops, crops, in_order, in_order, colours_q, colours_k, in_order)
