"""Random numbers that are a function of a counter, not of a history: Philox4x32-10, vectorised over samples.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. numpy has the same generator but
makes one stream per object; a batch here needs one short stream per sample.
"""

import numpy as np
from numpy.typing import NDArray

# Every use has its own stream, so that no two draws share random bits.
STREAM_CROP_Q, STREAM_CROP_K, STREAM_COLOUR_Q, STREAM_COLOUR_K, STREAM_LINEAR = range(5)

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Ten rounds of Philox4x32.

    Args:
        counter: (4, ...) words of 32 bits, held in uint64.
        key: two words of 32 bits.

    Returns:
        (4, ...) random words of 32 bits, held in uint64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    shift = np.uint64(32)
    for _ in range(10):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> shift) ^ c1 ^ np.uint64(k0),
            right & _LOW,
            (left >> shift) ^ c3 ^ np.uint64(k1),
            left & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniforms(seed: int, step: int, samples: NDArray[np.int64], stream: int, count: int) -> NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for each sample.

    Args:
        seed: the run's.
        step: optimiser step.
        samples: (N,) indices into the data set.
        stream: which use; one of the STREAM constants.
        count: numbers per sample; where more are asked for, the first ones stay what they were.

    Returns:
        (N, count) float64.
    """
    blocks = -(-count // 4)
    counter = np.empty((4, len(samples), blocks), dtype=np.uint64)
    counter[0] = np.asarray(samples, dtype=np.uint64)[:, None]
    counter[1] = step & 0xFFFFFFFF
    counter[2] = step >> 32
    counter[3] = np.arange(blocks, dtype=np.uint64)
    words = philox4x32(counter, (seed, stream))
    numbers = np.moveaxis(words, 0, -1).reshape(len(samples), 4 * blocks)[:, :count]
    return numbers.astype(np.float64) * 2.0**-32
