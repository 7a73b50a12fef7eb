"""The set of benchmarks/patches.py: its validation patches are of other parts of a photograph, and can be repeated."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.patches import CONFIG, GRID, NUM_VAL, PHOTOGRAPHS, VARIANTS, cut
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config

CELL = 60  # pixels
BRIGHTNESS = 15  # steps from cell to cell, more than JPEG changes


def made(root):
    """The cells, each of one gray, that patches of a split are from, in the order of their names."""
    grays = BRIGHTNESS * np.arange(GRID * GRID, dtype=np.uint8).reshape(GRID, GRID)
    picture = Image.fromarray(grays.repeat(CELL, axis=0).repeat(CELL, axis=1))
    cut(root, {"cells": picture}, num_train=4 * GRID * GRID, num_val=NUM_VAL)
    found = {}
    for split in ("train", "val"):
        patches = [np.asarray(Image.open(path)) for path in sorted((root / split / "cells").iterdir())]
        assert all(np.ptp(patch) <= 2 for patch in patches)  # none leaves its cell
        found[split] = [round(patch.mean() / BRIGHTNESS) for patch in patches]
    return found


def test_patches_of_validation_are_of_cells_of_their_own(tmp_path):
    cells = made(tmp_path)
    assert set(cells["train"]) | set(cells["val"]) == set(range(GRID * GRID))
    assert not set(cells["train"]) & set(cells["val"])
    assert {cell // GRID for cell in cells["val"]} == {cell % GRID for cell in cells["val"]} == set(range(GRID))
    assert len(set(cells["val"])) == GRID


def test_the_same_packages_give_the_same_bytes(tmp_path):
    made(tmp_path / "one")
    made(tmp_path / "two")
    files = list((tmp_path / "one").rglob("*.jpg"))
    assert len(files) == 4 * GRID * GRID + NUM_VAL
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_each_photograph_is_a_class():
    assert len(set(PHOTOGRAPHS)) == len(set(PHOTOGRAPHS.values())) == 36


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"recipe"}))
def test_a_variant_is_the_recipe_with_one_thing_changed(variant):
    recipe, other = (read_config(PretrainConfig, Path(CONFIG), VARIANTS[name]) for name in ("recipe", variant))
    changed = [name for name, section in recipe if section != getattr(other, name)]
    assert len(changed) == 1
