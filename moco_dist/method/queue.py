"""The dictionary as a queue of keys, one shard a rank (v1 sec. 3.1)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco_dist.distributed.collectives import shard_bounds
from moco_dist.distributed.world import World

_FILL_ROWS = 1024  # rows a generator fills at start


class Queue:
    """K keys, first in, first out, in sample order; this rank holds global rows `start` to `stop`.

    Attributes:
        keys: (K/W, C) unit vectors of this rank's shard.
        ptr: int64 (), the global row that the next key goes to; equal on all ranks.
        size: K, over all ranks.
    """

    def __init__(self, size: int, dim: int, seed: int, world: World, dtype: torch.dtype = torch.float32) -> None:
        self.size = size
        self.start, self.stop = shard_bounds(size, world)
        self.keys = _random_unit_rows(self.start, self.stop, dim, seed).to(world.device, dtype)
        self.ptr = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys` (B, C), the global batch in sample order, B <= K.

        Each rank stores the rows that fall in its shard. Rows wrap around at K, at any offset.
        """
        batch, ptr = keys.shape[0], int(self.ptr)
        assert batch <= self.size
        # The batch covers rows ptr .. ptr+batch-1 before wrapping; the shard also stands K rows further on.
        for shift in (0, self.size):
            first, last = max(self.start + shift, ptr), min(self.stop + shift, ptr + batch)
            if first < last:
                rows = slice(first - shift - self.start, last - shift - self.start)
                self.keys[rows] = keys[first - ptr : last - ptr].to(self.keys.dtype)
        self.ptr.fill_((ptr + batch) % self.size)


def _random_unit_rows(start: int, stop: int, dim: int, seed: int) -> Tensor:
    """Rows start .. stop-1 of an endless table of random unit vectors: the same rows in every world."""
    if start == stop:
        return torch.empty(0, dim)
    first_block, last_block = start // _FILL_ROWS, (stop - 1) // _FILL_ROWS
    blocks = []
    for block in range(first_block, last_block + 1):
        rows = np.random.default_rng([2, seed, block]).standard_normal((_FILL_ROWS, dim), dtype=np.float32)
        blocks.append(torch.from_numpy(rows))
    offset = first_block * _FILL_ROWS
    return F.normalize(torch.cat(blocks)[start - offset : stop - offset], dim=1)
