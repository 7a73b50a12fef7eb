"""Philox against its authors' known answers, and what the program needs of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moco_dist.data.counter_rng import philox4x32, uniforms


def words(*values):
    return np.array(values, dtype=np.uint64)


def test_known_answers():
    """The Random123 distribution's test vectors for philox4x32, 10 rounds."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(words(0, 0, 0, 0), (0, 0)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32(words(ones, ones, ones, ones), (ones, ones)).tolist() == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]
    assert philox4x32(words(*pi), (0xA4093822, 0x299F31D0)).tolist() == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


@given(
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=8),
    st.integers(1, 50),
)
def test_a_row_depends_on_its_sample_alone(seed, step, samples, count):
    rows = uniforms(seed, step, np.array(samples), 0, count)
    assert rows.shape == (len(samples), count)
    assert ((rows >= 0) & (rows < 1)).all()
    alone = uniforms(seed, step, np.array(samples[-1:]), 0, count)
    np.testing.assert_array_equal(rows[-1], alone[0])


def test_seed_step_sample_and_stream_each_change_everything():
    samples = np.arange(1000)
    base = uniforms(1, 2, samples, 0, 4)
    for other in (
        uniforms(2, 2, samples, 0, 4),
        uniforms(1, 3, samples, 0, 4),
        uniforms(1, 2, samples + 1000, 0, 4),
        uniforms(1, 2, samples, 1, 4),
        uniforms(1, 2 + 2**32, samples, 0, 4),
    ):
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.06
    assert abs(base.mean() - 0.5) < 0.02
