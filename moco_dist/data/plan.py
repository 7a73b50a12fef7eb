"""Who loads what at which step, as pure arithmetic (the design's ideas I and III).

Positions 0 .. B-1 of a step's global batch are dealt to ranks in order: rank r holds positions r·B/W to
(r+1)·B/W - 1, as whole BN groups. The query batch is the epoch's permutation in order. The key batch is a random
permutation of each of its blocks of neighbouring samples, so a BN group of keys mixes samples of all BN groups of
queries of its block. That is MoCo's shuffled BN (v1 sec. 3.3), whose authors shuffled over the 256 samples of one host.

A block that one rank holds needs nothing of other ranks. Where it lies on several, `mates` says which of them send each
other key crops, and the keys that come from none of them are decoded by the rank that encodes them.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moco_dist.config.pretrain import PretrainConfig, shuffle_block
from moco_dist.distributed.world import World
from moco_dist.errors import UserError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class KeyRoute:
    """Which key crops a rank makes in a step, of D samples, and how the N that it encodes come together.

    Attributes:
        samples: (D,) whose key crops it makes: first those for its mates (and itself), in the order of the ranks they
            go to, then those that it encodes and no mate decodes.
        send_counts: of the first, how many go to each mate.
        receive_counts: how many come from each mate; they are received in the order of the mates.
        gathered_rows: (N,) for each row of its key batch, which of the received crops, followed by the last of
            `samples`, it is.
    """

    samples: Indices
    send_counts: list[int]
    receive_counts: list[int]
    gathered_rows: Indices


@dataclass(frozen=True)
class Plan:
    """Sample indices of every step, for any rank of any world, from (seed, step) alone.

    An epoch is floor(num_samples / global_batch_size) steps over a permutation seeded by (seed, epoch). The few
    samples past the last whole batch are not lost: the next epoch permutes all of them anew.

    Attributes:
        num_samples: in the data set.
        global_batch_size: samples of one optimiser step, over all ranks.
        seed: the run's.
        block_size: samples among which keys are shuffled; it divides the batch. None: all of the batch; 1: they are
            not, and every rank makes the keys of its own samples.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    block_size: int | None = None
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
        """(B,) permutation P: the key batch's position i holds the sample at position P[i] of the query batch.

        Every block of positions is permuted in itself.
        """
        return self._permuted(step, range(self.global_batch_size))

    def query_indices(self, step: int, world: World) -> Indices:
        """(B/W,) samples whose queries this rank encodes."""
        return self.global_indices(step)[self._slice(world)]

    def key_indices(self, step: int, world: World) -> Indices:
        """(B/W,) samples whose keys this rank encodes."""
        own = self._positions(range(world.rank, world.rank + 1), world)
        return self.global_indices(step)[self._permuted(step, own)]

    def block_ranks(self, world: World) -> range:
        """The smallest run of ranks, with this one, that holds whole blocks: keys come from none but these."""
        local = self._local(world)
        count = math.lcm(local, self._block) // local
        first = world.rank // count * count
        return range(first, first + count)

    def mates(self, exchange: str, world: World) -> range:
        """The ranks, this one among them, that send each other key crops by a `shuffle.exchange`."""
        ranks = self.block_ranks(world)
        if exchange == "loader":
            return range(world.rank, world.rank + 1)
        if exchange == "auto":
            first = world.rank // world.local_world_size * world.local_world_size
            return range(max(first, ranks.start), min(first + world.local_world_size, ranks.stop))
        return ranks

    def key_route(self, step: int, world: World, mates: range) -> KeyRoute:
        """How the key crops that this rank encodes come from `mates`, who decode the samples as queries anyway."""
        local = self._local(world)
        group = self._positions(mates, world)
        batch, order = self.global_indices(step), self._permuted(step, group)
        encoder, decoder = np.array(group) // local, order // local
        own = order[encoder == world.rank]
        comes = (own // local >= mates.start) & (own // local < mates.stop)
        to_send = decoder == world.rank
        return KeyRoute(
            samples=batch[np.concatenate([order[to_send], own[~comes]])],
            send_counts=np.bincount(encoder[to_send] - mates.start, minlength=len(mates)).tolist(),
            receive_counts=np.bincount(own[comes] // local - mates.start, minlength=len(mates)).tolist(),
            gathered_rows=np.argsort(np.argsort(np.where(comes, own // local, mates.stop), kind="stable")),
        )

    @property
    def _block(self) -> int:
        return self.block_size or self.global_batch_size

    def _local(self, world: World) -> int:
        return self.global_batch_size // world.world_size

    def _positions(self, ranks: range, world: World) -> range:
        local = self._local(world)
        return range(ranks.start * local, ranks.stop * local)

    def _permuted(self, step: int, positions: range) -> Indices:
        """P at `positions`, which follow each other."""
        size = self._block
        if size == 1:
            return np.arange(positions.start, positions.stop)
        first, last = positions.start // size, -(-positions.stop // size)
        blocks = [
            # For block 0 this is the same generator as for [1, seed, step].
            block * size + np.random.default_rng([1, self.seed, step, block]).permutation(size)
            for block in range(first, last)
        ]
        return np.concatenate(blocks)[positions.start - first * size : positions.stop - first * size]

    def _slice(self, world: World) -> slice:
        local = self._local(world)
        return slice(world.rank * local, (world.rank + 1) * local)

    def _epoch_permutation(self, epoch: int) -> Indices:
        if epoch not in self._epochs:
            self._epochs.clear()  # one epoch is kept: 10 MB for ImageNet
            self._epochs[epoch] = np.random.default_rng([0, self.seed, epoch]).permutation(self.num_samples)
        return self._epochs[epoch]


def plan_of(config: PretrainConfig, num_samples: int) -> Plan:
    """The plan of a run over so many samples.

    Raises:
        UserError: they are less than one batch.
    """
    return Plan(num_samples, config.optim.global_batch_size, config.run.seed, shuffle_block(config))


def filling_steps(config: PretrainConfig, plan: Plan) -> range:
    """The steps whose batches fill the queue before step 0 (`moco.queue_start keys`): the last of the first epoch.

    Their samples come again as late as can be, when none of these keys is left in the queue. Empty for random keys.

    Raises:
        UserError: an epoch has fewer batches.
    """
    batch = config.optim.global_batch_size
    count = config.of_method.num_filling_batches(batch)
    if count > plan.steps_per_epoch:
        raise UserError(f"moco.queue_start keys: the queue takes {count} batches of {batch}, and an epoch has "
                        f"{plan.steps_per_epoch}; random works, or a smaller moco.queue_size")  # fmt: skip
    return range(plan.steps_per_epoch - count, plan.steps_per_epoch)


def share_at_home(batch: int, block: int, place: int) -> float:
    """The expected share of a batch's keys that are encoded where their queries are.

    Args:
        batch: samples.
        block: neighbouring samples among which keys are shuffled.
        place: neighbouring samples that a rank, or a host, holds.
    """
    edges = np.unique([*range(0, batch, block), *range(0, batch, place), batch])
    return float((np.diff(edges).astype(np.float64) ** 2).sum() / (block * batch))
