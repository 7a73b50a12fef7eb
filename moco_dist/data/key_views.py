"""How a rank comes by the key views that it encodes: `shuffle.exchange`. All ways give the same views, bit for bit.

Nothing is exchanged where a rank holds whole blocks. Otherwise a rank of n samples, with views of S x S pixels, has
these costs; h is the expected share of keys that are encoded where their queries are (on the same rank, or host):
    loader      2 - h(rank) decodes a sample; nothing is received
    auto        2 - h(host) decodes; (h(host) - h(rank)) n 3 S^2 bytes (uint8) from ranks of the same host
    all_to_all  1 decode; (1 - h(rank)) n 3 S^2 bytes
    all_gather  1 decode; (ranks of the block - 1) n 12 S^2 bytes (float32); usual, here to be measured against
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.batch import CropBatch, to_device
from moco_dist.data.colours import apply_colours
from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import all_gather_in, group_of, start_all_to_all_rows
from moco_dist.distributed.world import World


class KeyExchange:
    """Key views of one run, on this rank. Made once, by all ranks: those of a block become a process group.

    Attributes:
        mates: the ranks that send each other key views; this one alone where nothing is exchanged.
    """

    def __init__(self, config: PretrainConfig, plan: Plan, world: World) -> None:
        self._config, self._plan, self._world = config, plan, world
        self.mates = plan.mates(config.shuffle.exchange, world)
        self._group = group_of(self.mates)
        self._gathers = len(self.mates) > 1 and config.shuffle.exchange == "all_gather"

    def exchanged(self, batches: Iterator[CropBatch], start: int) -> Generator[CropBatch, None, None]:
        """The batches of steps `start`, ... with the key crops that this rank encodes; the next ones travel meanwhile.

        With `all_gather` nothing travels before it is coloured.
        """
        if len(self.mates) == 1 or self._gathers:
            yield from batches
            return
        coming = None
        for step, batch in enumerate(batches, start):
            begun = self._begin(batch, step)
            if coming is not None:
                yield coming()
            coming = begun
        if coming is not None:
            yield coming()

    def _begin(self, batch: CropBatch, step: int) -> Callable[[], CropBatch]:
        """Send this rank's crops of a step; what is returned waits for those of the others."""
        route, crops = self._plan.key_route(step, self._world, self.mates), batch.view_k
        rows = crops.permute(0, 2, 3, 1)
        is_channels_last = rows.is_contiguous()
        rows = rows if is_channels_last else crops
        num_sent = sum(route.send_counts)
        wait = start_all_to_all_rows(rows[:num_sent], route.send_counts, route.receive_counts, self._group)

        def finish() -> CropBatch:
            gathered = torch.cat([wait(), rows[num_sent:]]) if num_sent < len(rows) else wait()
            # By [...] a CPU would copy value by value, which takes eight times as long.
            keys = gathered.index_select(0, to_device(route.gathered_rows, gathered.device))
            return replace(batch, view_k=keys.permute(0, 3, 1, 2) if is_channels_last else keys)

        return finish

    def coloured(
        self, batch: CropBatch, step: int, dtype: torch.dtype, colour: Callable[..., Tensor] = apply_colours
    ) -> Tensor:
        """(n, 3, S, S) of `dtype`: the key views of `Plan.key_indices`, in that order, of a batch of `exchanged`.

        `colour` is `apply_colours`, compiled or not.
        """
        augment = self._config.augment
        if not self._gathers:
            return colour(batch.view_k, batch.colours_k, augment, dtype)
        own = colour(batch.view_k, batch.colours_k, augment, torch.promote_types(dtype, torch.float32))
        n = len(own)
        order = self._plan.key_permutation(step)[self._world.rank * n :][:n] - self.mates.start * n
        gathered = all_gather_in(own.permute(0, 2, 3, 1), self._group, len(self.mates))
        return gathered.index_select(0, to_device(order, own.device)).permute(0, 3, 1, 2).to(dtype)
