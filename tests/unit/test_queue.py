"""The queue: first in, first out, at any offset, on any number of shards."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moco_dist.distributed.world import World
from moco_dist.method.queue import Queue


def shards(size, world_size, dim=3):
    return [Queue(size, dim, 0, World(rank, rank, world_size, world_size)) for rank in range(world_size)]


@given(size=st.integers(1, 60), world_size=st.integers(1, 9), data=st.data())
def test_any_batches_on_any_shards_equal_a_plain_ring(size, world_size, data):
    queues = shards(size, world_size)
    ring = torch.cat([q.keys for q in queues])
    torch.testing.assert_close(ring, shards(size, 1)[0].keys, rtol=0, atol=0)  # the same start in every world
    ptr, counter = 0, 0.0
    for batch in data.draw(st.lists(st.integers(1, size), max_size=6)):
        keys = torch.arange(counter, counter + batch)[:, None].expand(batch, 3)
        counter += batch
        for key in keys:
            ring[ptr] = key
            ptr = (ptr + 1) % size
        for queue in queues:
            queue.enqueue(keys)
    assert all(queue.ptr == ptr for queue in queues)
    torch.testing.assert_close(torch.cat([q.keys for q in queues]), ring, rtol=0, atol=0)


def test_start_is_unit_vectors_all_different():
    keys = Queue(3000, 16, 5, World()).keys
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(3000))
    assert (keys @ keys.T - torch.eye(3000)).max() < 0.999
    assert not torch.equal(keys, Queue(3000, 16, 6, World()).keys)
    torch.testing.assert_close(keys, F.normalize(keys, dim=1))
