"""The comparison with the reference can fail: each of these mistakes, made on purpose, is seen by it."""

import numpy as np
import pytest

from moco_dist.data.plan import Plan
from moco_dist.distributed import collectives
from moco_dist.method import batch_norm, infonce, moco
from moco_dist.method.moco import MoCo
from moco_dist.method.queue import Queue
from tests.distributed.expected import STEPS, reference
from tests.distributed.program import largest_difference, run_program, small_config
from tests.world import run

# Each runs in the ranks' own processes, which end with the test.


def ranks_swapped_in_the_gather():
    infonce.all_gather = lambda x, world: collectives.all_gather(x, world).roll(x.shape[0], dims=0)


def key_batch_not_permuted():
    Plan.key_permutation = lambda self, step: np.arange(self.global_batch_size)


def keys_not_brought_home():
    infonce.unshuffle = lambda k_shuffled, key_order: k_shuffled


def enqueue_before_the_loss():
    queues = []
    make, enqueue, gather = Queue.__init__, Queue.enqueue, moco.gather_and_unshuffle

    def remember(self, *args):
        make(self, *args)
        queues.append(self)

    def exchange_and_enqueue(*args):
        q_all, k_all = gather(*args)
        enqueue(queues[0], k_all.flatten(0, 1))
        return q_all, k_all

    Queue.__init__, Queue.enqueue = remember, lambda self, keys: None
    moco.gather_and_unshuffle = exchange_and_enqueue


def queue_not_persistent():
    Queue.enqueue = lambda self, keys: None


def wrap_dropped():
    enqueue = Queue.enqueue

    def stop_at_the_end(self, keys):
        room = self.size - int(self.ptr)
        enqueue(self, keys[:room])

    Queue.enqueue = stop_at_the_end


def shard_forgotten_in_the_loss():
    infonce.reduce_scatter_sum = lambda x, world: x.chunk(world.world_size)[world.rank]


def momentum_update_after_the_keys():
    update, encode = moco.momentum_update, MoCo._encode_keys
    moco.momentum_update = lambda *args: None

    def encode_then_update(self, view):
        keys = encode(self, view)
        update(self.query_encoder, self.key_encoder, self._config.moco.momentum)
        return keys

    MoCo._encode_keys = encode_then_update


def batch_norm_over_the_whole_rank():
    forward = batch_norm.GroupedBatchNorm2d.forward

    def one_group(self, input):
        self.group_size = input.shape[0]
        return forward(self, input)

    batch_norm.GroupedBatchNorm2d.forward = one_group


MUTATIONS = [
    ranks_swapped_in_the_gather,
    key_batch_not_permuted,
    keys_not_brought_home,
    enqueue_before_the_loss,
    queue_not_persistent,
    wrap_dropped,
    shard_forgotten_in_the_loss,
    momentum_update_after_the_keys,
    batch_norm_over_the_whole_rank,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_is_noticed(mutation):
    ours = run(run_program, 2, small_config(), STEPS, mutation)[0]
    assert largest_difference(ours["losses"], reference()["losses"]) > 1e-6
