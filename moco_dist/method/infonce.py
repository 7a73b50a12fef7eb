"""InfoNCE as attention over the queue (the design's idea IV): no N x (1 + K) logits, no backward collective.

With unit vectors q, k (N, C), queue keys U (K, C) and temperature tau (v1 eq. 1):

    loss    = mean(logaddexp(q.k/tau, lse) - q.k/tau)           lse = logsumexp_j(q.u_j/tau)
    dloss/dq = (1 - p_pos) / (tau N) (o - k)                      o = sum_j softmax_j(q.u_j/tau) u_j

`o` and `lse` are what a flash-attention kernel gives for queries q, keys U and values U. Logits are at most 1/tau,
so the weights w_j = exp((q.u_j - 1)/tau) cannot overflow, and the sums of w_j u_j and of w_j over parts of the queue
simply add up: over blocks, over a kernel's splits and over the ranks' shards. o = sum w u / sum w and
lse = log(sum w) + 1/tau.

Everything here is float32 under any autocast. A step's products with a queue of 65,536 keys are a thousandth of a
ResNet-50's, so 16-bit ones would save nothing and cost three digits: against float64 the gradient (of unit size) is
off by less than 5e-7 in float32, and by up to 5e-4 where q and the queue are rounded to bfloat16. On a GPU
`engine.allow_tf32` lets the Triton kernel use TF32, with about the precision of float16.
"""

import math

import torch
from torch import Tensor

from moco_dist.distributed.collectives import all_gather, all_reduce_sum, reduce_scatter_sum
from moco_dist.distributed.world import World

_TRITON_MAX_DIM = 256  # columns that the kernel's block has room for
_BLOCK_ROWS = 16_384  # queue rows at a time where there is no flash kernel


def gather_and_unshuffle(q: Tensor, keys: Tensor, key_order: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """All ranks' q, and all ranks' keys in sample order, in one all-gather.

    Args:
        q: (N, C) this rank's queries of one micro-batch.
        keys: (D·B/W, C) the keys this rank encoded, direction after direction: of the shuffled batch, then, if the loss
            is symmetric, of the batch in sample order.
        key_order: int64 (B,), as in `Views`.
        world: this process.

    Returns:
        q_all: (W·N, C) in rank order. k_all: (D, B, C). Receives (W - 1) (N + D·B/W) C numbers.
    """
    gathered = all_gather(torch.cat([q.detach(), keys])[None], world)  # (W, N + D·B/W, C)
    q_all, k_all = gathered.split([q.shape[0], keys.shape[0]], dim=1)
    local_batch = len(key_order) // world.world_size
    shuffled, *in_order = (k.flatten(0, 1) for k in k_all.split(local_batch, dim=1))
    return q_all.flatten(0, 1), torch.stack([unshuffle(shuffled, key_order), *in_order])


def unshuffle(k_shuffled: Tensor, key_order: Tensor) -> Tensor:
    """(B, C) keys of the shuffled batch, back in sample order."""
    k_all = torch.empty_like(k_shuffled)
    k_all[key_order] = k_shuffled
    return k_all


def info_nce(q: Tensor, k: Tensor, q_all: Tensor, queue_keys: Tensor, temperature: float, world: World) -> Tensor:
    """The loss of this rank's queries against the whole queue (v1 eq. 1), with its gradient in the same pass.

    Args:
        q: (N, C) this rank's queries, with gradient.
        k: (N, C) their positive keys.
        q_all: (W·N, C) all ranks' queries.
        queue_keys: (K/W, C) this rank's shard.
        temperature: tau.
        world: this process.

    Returns:
        (), the mean over this rank's N; the mean over ranks, which the engine takes of the gradients, makes it the
        global batch's. Receives (W - 1) N (C + 1) numbers.
    """
    sums = reduce_scatter_sum(weighted_sums(q_all, queue_keys, temperature), world)
    total = sums[:, -1]
    out = (sums[:, :-1] / total[:, None]).to(q.dtype)
    lse = (total.log() + 1 / temperature).to(q.dtype)
    return _InfoNCE.apply(q, k, out, lse, temperature)  # type: ignore[no-any-return]


class _InfoNCE(torch.autograd.Function):
    """The scalar loss, with its gradient with respect to q written out; k and the queue get none."""

    @staticmethod
    def forward(ctx, q, k, out, lse, temperature):
        positive = (q * k).sum(1) / temperature
        total = torch.logaddexp(positive, lse)
        p_pos = torch.exp(positive - total)
        ctx.save_for_backward((1 - p_pos)[:, None] / (temperature * q.shape[0]) * (out - k))
        return (total - positive).mean()

    @staticmethod
    def backward(ctx, grad_loss):
        return grad_loss * ctx.saved_tensors[0], None, None, None, None


@torch.no_grad()
def weighted_sums(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """What queries see of a part of the queue, in O(N C + block) memory.

    Args:
        q: (N, C) unit vectors.
        keys: (K, C) unit vectors; K may be 0.
        temperature: tau.

    Returns:
        (N, C + 1): the sum of w_j u_j, and in the last column the sum of w_j; never below float32, and float64 where
        float32 could not hold the smallest weight, exp(-2/tau).
    """
    dtype = torch.float64 if 2 / temperature > 80 else torch.promote_types(q.dtype, torch.float32)
    if keys.shape[0] == 0:
        return q.new_zeros(q.shape[0], q.shape[1] + 1, dtype=dtype)
    if q.device.type == "cpu":
        return _by_flash(q, keys, temperature, dtype)
    if q.dtype == dtype == torch.float32 and q.shape[1] <= _TRITON_MAX_DIM:
        return _by_triton(q, keys, temperature)
    return _by_blocks(q.to(dtype), keys.to(dtype), temperature)


def _by_triton(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """By one kernel, for GPUs."""
    from moco_dist.method import infonce_triton  # there is no Triton where there is no GPU

    return infonce_triton.weighted_sums(q, keys, temperature)


def _by_flash(q: Tensor, keys: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """`weighted_sums` by the flash-attention kernel that PyTorch has for CPUs.

    The kernel gives each thread blocks of 32 queries of one head. Where there are fewer blocks than threads, parts of
    the queue take the place of heads.
    """
    threads_per_block = max(1, torch.get_num_threads() // math.ceil(q.shape[0] / 32))
    parts = math.gcd(keys.shape[0], 1 << threads_per_block.bit_length() - 1)  # a power of two, that divides
    heads = keys.unflatten(0, (parts, -1))[None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.expand(1, parts, -1, -1), heads, heads, scale=1 / temperature
    )
    weight = torch.exp(lse[0].to(dtype) - 1 / temperature)[..., None]
    return torch.cat([weight * out[0], weight], dim=-1).sum(0)


def _by_blocks(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """`weighted_sums` by matrix products, one block of the queue at a time, on any device and in any dtype."""
    sums = q.new_zeros(q.shape[0], q.shape[1] + 1)
    for block in keys.split(_BLOCK_ROWS):
        weights = torch.exp((q @ block.T - 1) / temperature)
        sums[:, :-1] += weights @ block
        sums[:, -1] += weights.sum(1)
    return sums


@torch.no_grad()
def contrastive_accuracy(q_all: Tensor, k_all: Tensor, queue_keys: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Percent of all W·N queries whose positive key is the most similar (top-1), or among the five most (top-5).

    Counts, over all shards, the negatives above the positive; for log steps only. Receives 2 (W - 1)/W · W·N numbers.
    """
    positive = (q_all * k_all).sum(1, keepdim=True)
    above = q_all.new_zeros(q_all.shape[0])
    for block in queue_keys.split(_BLOCK_ROWS):
        above += (q_all @ block.T > positive).sum(1)
    above = all_reduce_sum(above, world)
    return 100 * (above < 1).float().mean(), 100 * (above < 5).float().mean()
