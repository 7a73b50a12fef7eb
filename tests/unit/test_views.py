"""The contact sheet shows pairs of views of the same sample, whatever way key views travel."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.pairs import view_pairs
from moco_dist.datasets.prepare import prepare_shapes

PLAIN = {"crop_scale": [1.0, 1.0], "jitter_probability": 0, "grayscale_probability": 0, "blur_probability": 0,
         "flip_probability": 0}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("views") / "shapes", num_train=40, num_val=10)


@pytest.mark.parametrize("exchange", ["loader", "all_to_all", "all_gather"])
def test_pairs_are_of_the_same_sample(data, exchange):
    """Without any augmentation, the two views of a pair are one picture."""
    config = PretrainConfig.model_validate({
        "run": {"dir": "unused"}, "data": {"root": data, "image_size": 64}, "augment": PLAIN,
        "shuffle": {"exchange": exchange},
    })  # fmt: skip
    pairs = view_pairs(config, 6)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert not torch.equal(pairs[0], pairs[1])


def test_the_command_writes_a_sheet(data, tmp_path, capsys):
    words = ["data", "views", "configs/demo.yaml", "--out", str(tmp_path / "v.png"), "--count", "6"]
    assert main([*words, "--data.root", str(data), "--augment.recipe", "v1"]) == 0
    sheet = np.asarray(Image.open(tmp_path / "v.png"))
    assert sheet.shape == (2 * (32 + 4) + 4, 8 * (32 + 4) + 4, 3)
    assert main([*words[:3], "--out", str(tmp_path / "v.jpg")]) == 2
    assert main([*words, "--augment.recipi", "v1"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "a contact sheet is a .png file" in errors[0]
    assert "did you mean --augment.recipe?" in errors[1]
