"""The queue's weighted sums in one pass on a GPU: no logits in memory, the queue read once.

The queue is split along K so that all multiprocessors work when there are few queries; the splits' sums are added,
as shards' are (see `infonce`). Weights need no running maximum: logits are bounded by 1/tau.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    q_ptr, keys_ptr, sums_ptr, num_q, num_keys, dim, keys_per_split, scale,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries against one split of the queue; `scale` is log2(e) / tau."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    columns = tl.arange(0, BLOCK_C)
    in_dim = columns < dim
    q = tl.load(q_ptr + rows[:, None] * dim + columns, (rows[:, None] < num_q) & in_dim[None, :], 0.0)
    weighted = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    last = tl.minimum((split + 1) * keys_per_split, num_keys)
    for first in range(split * keys_per_split, last, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        # 64-bit offsets: a queue of 16 million keys has 2^31 numbers
        offsets = j.to(tl.int64)[:, None] * dim + columns
        keys = tl.load(keys_ptr + offsets, (j[:, None] < last) & in_dim[None, :], 0.0)
        cosine = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        weights = tl.where(j[None, :] < last, tl.exp2((cosine - 1.0) * scale), 0.0)
        total += tl.sum(weights, 1)
        weighted += tl.dot(weights, keys, input_precision=PRECISION)
    out = sums_ptr + (split * num_q + rows).to(tl.int64)[:, None] * (dim + 1)
    tl.store(out + columns, weighted, (rows[:, None] < num_q) & in_dim[None, :])
    tl.store(out + dim, total[:, None], rows[:, None] < num_q)


def launch_options(dim: int, precision: str) -> dict[str, Any]:
    """Block sizes and options of the kernel for C = `dim`, chosen by what ptxas makes of it.

    With these options no register spills to memory (with blocks of 64 x 64 in `ieee` 7 kB a thread do), one block fits
    the 99 kB of the smallest cards since Ampere, and two blocks fit a multiprocessor of an A100 or H100.
    """
    block_c = max(16, triton.next_power_of_2(dim))
    # Tensor cores of Hopper take 64 rows.
    rows = {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 8} if precision == "ieee" else {
        "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4}  # fmt: skip
    if block_c > 128:
        rows["BLOCK_K"] = 16
    # Triton 3.10's default is no fused multiply-add.
    return {**rows, "BLOCK_C": block_c, "PRECISION": precision, "num_stages": 2, "enable_fp_fusion": True}


def weighted_sums(q: Tensor, keys: Tensor, temperature: float, precision: str | None = None) -> Tensor:
    """`infonce.weighted_sums` for float32 on CUDA.

    Args:
        q: (N, C), C up to 256.
        keys: (K, C) contiguous.
        temperature: tau.
        precision: of the products: `tf32` or `ieee`; by default what torch allows for matrix products.

    Returns:
        float32 (N, C + 1).
    """
    if precision is None:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    num_q, dim = q.shape
    num_keys = keys.shape[0]
    options = launch_options(dim, precision)
    block_k = options["BLOCK_K"]
    query_blocks = triton.cdiv(num_q, options["BLOCK_N"])
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 3
    splits = max(1, min(2 * processors // query_blocks, triton.cdiv(num_keys, block_k)))
    keys_per_split = triton.cdiv(triton.cdiv(num_keys, splits), block_k) * block_k
    splits = triton.cdiv(num_keys, keys_per_split)
    sums = q.new_empty(splits, num_q, dim + 1)
    _kernel[(query_blocks, splits)](
        q.contiguous(), keys, sums, num_q, num_keys, dim, keys_per_split, math.log2(math.e) / temperature, **options
    )
    return sums.sum(0)
