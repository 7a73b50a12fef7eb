"""What key views cost, by arithmetic alone: decodes and bytes, by `shuffle.exchange` and where blocks lie."""

import math
from dataclasses import dataclass

from moco_dist.config.pretrain import PretrainConfig, default_block
from moco_dist.data.plan import share_at_home

FLOAT_BYTES = 4


@dataclass(frozen=True)
class KeyTraffic:
    """What the key views of one rank cost in one step.

    Attributes:
        block_size: samples among which keys are shuffled.
        block_ranks: ranks that whole blocks lie on.
        spans_hosts: whether those ranks are of several hosts.
        exchange: `shuffle.exchange`.
        decodes: of files, for each sample of the batch.
        received_bytes: of key views from other ranks.
        into_host_bytes: of key views that come over a host's link, for all its ranks.
    """

    block_size: int
    block_ranks: int
    spans_hosts: bool
    exchange: str
    decodes: float
    received_bytes: int
    into_host_bytes: int

    def text(self) -> str:
        """One line."""
        if self.block_size == 1:
            return "keys are not shuffled, as there is no BatchNorm: each rank makes those of its own samples"
        where = "on one rank"
        if self.block_ranks > 1:
            where = f"on {self.block_ranks} ranks of {'several hosts' if self.spans_hosts else 'a host'}"
        return (
            f"keys are shuffled within {self.block_size} samples, {where}; shuffle.exchange {self.exchange}: "
            f"{self.decodes:.2f} decodes a sample, {self.received_bytes / 1e6:,.1f} MB of key views to a rank and "
            f"step, {self.into_host_bytes / 1e6:,.1f} MB into a host"
        )


def key_traffic(config: PretrainConfig, local_batch: int, world_size: int, local_world_size: int) -> KeyTraffic:
    """The cost for each of `world_size` ranks, `local_world_size` of them on a host, with `local_batch` samples each.

    The batch is what so many ranks have together, whatever the config says: its block is the config's, or the default.
    """
    batch, exchange = local_batch * world_size, config.shuffle.exchange
    block = min(batch, config.shuffle.block_size or default_block(batch, config.model.bn_group_size))
    at_rank = share_at_home(batch, block, local_batch)
    at_host = share_at_home(batch, block, local_batch * local_world_size)
    ranks = math.lcm(local_batch, block) // local_batch
    spans_hosts = world_size > local_world_size and local_world_size % ranks > 0
    crops = local_batch * 3 * config.data.image_size**2  # bytes of as many uint8 views as a rank encodes
    decodes, received, into_host = {
        "loader": (2 - at_rank, 0.0, 0.0),
        "auto": (2 - at_host, (at_host - at_rank) * crops, 0.0),
        "all_to_all": (1.0, (1 - at_rank) * crops, local_world_size * (1 - at_host) * crops),
        "all_gather": (1.0, (ranks - 1) * FLOAT_BYTES * crops, spans_hosts * (ranks - 1) * FLOAT_BYTES * crops),
    }[exchange]
    if world_size == local_world_size:
        into_host = 0.0
    return KeyTraffic(block, ranks, spans_hosts, exchange, decodes, round(received), round(into_host))
