"""The parts that are timed are functions of the program; a rename would end the benchmark on the day it is run."""

import pytest

from benchmarks.step_parts import PARTS


@pytest.mark.parametrize(("owner", "name"), PARTS)
def test_a_part_is_a_function(owner, name):
    assert callable(getattr(owner, name))
