"""Who loads what at which step, as pure arithmetic (the design's ideas I and III).

Positions 0 .. B-1 of a step's global batch are dealt to ranks in order: rank r holds positions r·B/W to
(r+1)·B/W - 1, as whole BN groups. The query batch is the epoch's permutation in order; the key batch is a random
permutation of the query batch, so a rank's key group mixes samples whose queries are elsewhere. That is MoCo's
shuffled BN (v1 sec. 3.3), done by loading instead of sending.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moco_dist.distributed.world import World
from moco_dist.errors import UserError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class KeyRoute:
    """One rank's part in an all-to-all of key crops.

    Attributes:
        send_rows: (B/W,) rows of the query batch, in the order of the ranks they go to.
        send_counts: rows for each rank.
        receive_rows: (B/W,) row of the key batch that the i-th received crop is.
        receive_counts: rows from each rank.
    """

    send_rows: Indices
    send_counts: list[int]
    receive_rows: Indices
    receive_counts: list[int]


@dataclass(frozen=True)
class Plan:
    """Sample indices of every step, for any rank of any world, from (seed, step) alone.

    An epoch is floor(num_samples / global_batch_size) steps over a permutation seeded by (seed, epoch). The few
    samples past the last whole batch are not lost: the next epoch permutes all of them anew.

    Attributes:
        num_samples: in the data set.
        global_batch_size: samples of one optimiser step, over all ranks.
        seed: the run's.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    _epochs: dict[int, Indices] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch_size:
            raise UserError(
                f"the data set has {self.num_samples} images, less than one batch "
                f"(optim.global_batch_size {self.global_batch_size})"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data set."""
        return self.num_samples // self.global_batch_size

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def global_indices(self, step: int) -> Indices:
        """(B,) samples of the global batch, in query order."""
        start = step % self.steps_per_epoch * self.global_batch_size
        return self._epoch_permutation(self.epoch(step))[start : start + self.global_batch_size]

    def key_permutation(self, step: int) -> Indices:
        """(B,) permutation P: the key batch's position i holds the sample at position P[i] of the query batch."""
        return np.random.default_rng([1, self.seed, step]).permutation(self.global_batch_size)

    def query_indices(self, step: int, world: World) -> Indices:
        """(B/W,) samples whose queries this rank encodes."""
        return self.global_indices(step)[self._slice(world)]

    def key_indices(self, step: int, world: World) -> Indices:
        """(B/W,) samples whose keys this rank encodes."""
        return self.global_indices(step)[self.key_permutation(step)[self._slice(world)]]

    def key_route(self, step: int, world: World) -> "KeyRoute":
        """How key crops travel from the ranks that decoded them to the ranks that encode them.

        For `shuffle.exchange: all_to_all`, where a rank decodes its query samples alone and crops both views.
        """
        local = self.global_batch_size // world.world_size
        order = self.key_permutation(step)
        decoder, encoder = order // local, np.arange(len(order)) // local
        sent = decoder == world.rank
        decoders_of_mine = decoder[self._slice(world)]
        return KeyRoute(
            send_rows=order[sent] - world.rank * local,
            send_counts=np.bincount(encoder[sent], minlength=world.world_size).tolist(),
            receive_rows=np.argsort(decoders_of_mine, kind="stable"),
            receive_counts=np.bincount(decoders_of_mine, minlength=world.world_size).tolist(),
        )

    def _slice(self, world: World) -> slice:
        local = self.global_batch_size // world.world_size
        return slice(world.rank * local, (world.rank + 1) * local)

    def _epoch_permutation(self, epoch: int) -> Indices:
        if epoch not in self._epochs:
            self._epochs.clear()  # one epoch is kept: 10 MB for ImageNet
            self._epochs[epoch] = np.random.default_rng([0, self.seed, epoch]).permutation(self.num_samples)
        return self._epochs[epoch]
