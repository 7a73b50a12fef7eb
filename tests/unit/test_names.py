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


LONG = "n" * 255  # as long as a folder's name may be
PATHS = ["a/1.jpg", "a/b/2.jpg", "3.jpg", "", "/4.jpg", f"{LONG}/5.jpg", "é" * 20 + "/6", "a\udce9/7", "a/8", "9/"]


@pytest.mark.parametrize("between", ["", "\n", "//"], ids=repr)
def test_the_first_folder_of_each_and_what_is_below(between):
    parts = [path.encode("utf-8", "surrogateescape") for path in PATHS]
    ends = np.cumsum([len(part) + len(between) for part in parts]) - len(between)
    content = np.frombuffer(between.encode().join(parts), np.uint8)
    names = Names(content, ends, None, ends - [len(part) for part in parts])
    assert (list(names), names.digest()) == (PATHS, hash_of_list(PATHS))
    for chosen in (np.arange(len(PATHS)), np.array([7, 0, 0, 2]), np.array([], np.int64)):
        folders, found = names.take(chosen).first_folders()
        expected = [PATHS[row].partition("/")[0] if PATHS[row].find("/") > 0 else None for row in chosen]
        assert [found[number] if number >= 0 else None for number in folders] == expected
        assert found == list(dict.fromkeys(filter(None, expected)))
    folders, found = names.first_folders()
    depths = np.array([len(folder.encode("utf-8", "surrogateescape")) + 1 for folder in found] + [0])[folders]
    below = [path.partition("/")[2] if path.find("/") > 0 else path for path in PATHS]
    assert list(names.below(depths)) == below
