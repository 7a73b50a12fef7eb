"""Names in arrays are the names."""

import numpy as np
import pytest

from moco_dist.data.names import Names, hash_of_list

LISTS = ([], [""], ["", ""], ["a/1.jpg", "b/2.jpg"], ["é.jpg", "a\udce9b.jpg", "", "中/文\n.jpg"])


@pytest.mark.parametrize("names", LISTS, ids=repr)
def test_are_looked_up_gone_through_chosen_and_hashed_as_a_list(names):
    arrays, backwards = Names.of(names), np.arange(len(names))[::-1]
    assert (len(arrays), list(arrays), [arrays[i] for i in range(len(names))]) == (len(names), names, names)
    assert arrays.digest() == hash_of_list(names)
    chosen = arrays.take(backwards)
    assert list(chosen) == names[::-1] == [arrays[-1 - i] for i in range(len(names))]
    assert chosen.digest() == hash_of_list(names[::-1])
    assert chosen.take(backwards) == names and arrays[1:] == names[1:]
    with pytest.raises(IndexError):
        arrays[len(names)]
