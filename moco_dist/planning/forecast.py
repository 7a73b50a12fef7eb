"""Seconds of a step from arithmetic, measured parts and the link's rate; None wherever one of them is missing.

    step = max(compute + latency + (features + images + gradients not hidden behind the backward pass) / rate, loading)

DDP begins to all-reduce a bucket as soon as its gradients are there. The last bucket cannot hide behind the backward
pass, nor can what is left when that has ended. Collectives are rings, each of which crosses a host's link once.
"""

from dataclasses import dataclass, replace

from moco_dist.planning.arithmetic import Sizes
from moco_dist.planning.measurements import Measurement

LARGEST_WORLD = 1024
COLLECTIVES = 3  # features, the loss's sums, the agreement to go on; images, where they travel, are counted by bytes


@dataclass(frozen=True)
class Forecast:
    """A step of one planned world.

    Attributes:
        sizes: arithmetic.
        step: the measurement of a rank's step alone; None: there is none.
        bytes_per_second: into a host, or, on one host, of the ring between its GPUs; None: not known.
        latency_seconds: of one collective.
        loader_core_seconds: CPU seconds of a rank's batch; None: not measured.
        workers: loader processes or threads a rank; each is taken to have a core.
    """

    sizes: Sizes
    step: Measurement | None
    bytes_per_second: float | None
    latency_seconds: float = 0.0
    loader_core_seconds: float | None = None
    workers: int = 1

    @property
    def compute_seconds(self) -> float | None:
        """Seconds of a rank's step alone: colours, both encoders, loss, optimiser."""
        return self.step.parts["step"] if self.step else None

    def transfer_seconds(self) -> dict[str, float] | None:
        """Seconds of each part's transfer, if nothing else happened; None: the rate is not known."""
        if self.sizes.world_size == 1:
            return dict.fromkeys(self.sizes.received(), 0.0)
        if self.bytes_per_second is None:
            return None
        hosts = self.sizes.world_size // self.sizes.local_world_size
        moved = self.sizes.into_host() if hosts > 1 else self.sizes.received()
        return {name: count / self.bytes_per_second for name, count in moved.items()}

    def waited_for_network(self) -> float | None:
        """Seconds of a step in which the device waits for the network."""
        transfer = self.transfer_seconds()
        if transfer is None or self.step is None:
            return None
        gradients = transfer["gradients"]
        hidden = min(self.step.parts["backward"], gradients * (1 - self.sizes.last_bucket_share))
        latency = COLLECTIVES * self.latency_seconds if self.sizes.world_size > 1 else 0.0
        return transfer["features"] + transfer["images"] + gradients - hidden + latency

    @property
    def loading_seconds(self) -> float | None:
        """Seconds in which a rank's workers load its batch."""
        return None if self.loader_core_seconds is None else self.loader_core_seconds / max(1, self.workers)

    def step_seconds(self) -> float | None:
        """Seconds of the whole step. A loader that was not measured is taken to keep up."""
        compute, network, loading = self.compute_seconds, self.waited_for_network(), self.loading_seconds
        if compute is None or network is None:
            return None
        if loading is not None and self.workers == 0:
            return compute + network + loading  # in the training process itself
        return max(compute + network, loading or 0.0)

    def bottleneck(self) -> str | None:
        """What a step waits for, and what would make it shorter; None: not known."""
        compute, network, loading = self.compute_seconds, self.waited_for_network(), self.loading_seconds
        if compute is None or network is None:
            return None
        if loading is not None and loading > compute + network:
            once = ", or --shuffle.exchange all_to_all, which decodes each image once"
            return "loading: more data.num_workers, data.loader ffcv or dali" + once * (self.sizes.keys.decodes > 1)
        if network > compute:
            return "network: a faster link, or a larger batch a GPU"
        return "computing: more GPUs, bf16, or engine.compile" + (
            "" if loading is not None else " (the loader was not measured and is taken to keep up)"
        )


def weak_scaling(
    one: Sizes, step: Measurement | None, rate_within: float | None, rate_between: float | None, latency: float
) -> list[tuple[int, float | None]]:
    """(GPUs, efficiency) up to LARGEST_WORLD with the same batch a GPU, so that the global batch grows along.

    Args:
        one: the planned sizes.
        step: a rank's step alone.
        rate_within: bytes per second of the ring in a host.
        rate_between: into a host.
        latency: seconds of a small collective, as measured.
    """
    rows, world_size = [], 1
    while world_size <= LARGEST_WORLD:
        local = min(world_size, one.local_world_size)
        rate = rate_within if world_size <= one.local_world_size else rate_between
        seconds = None
        if world_size % local == 0:
            seconds = Forecast(
                replace(one, world_size=world_size, local_world_size=local), step, rate, latency
            ).step_seconds()
        rows.append((world_size, step.parts["step"] / seconds if step and seconds else None))
        world_size *= 2
    return rows
