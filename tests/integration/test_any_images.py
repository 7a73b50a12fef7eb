"""`moco-dist features`: features of any images, the same on any number of ranks, into a file that others read."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moco_dist.cli.main import main
from moco_dist.config.evaluate import EvalConfig, EvalDataConfig
from moco_dist.data.crops import centre_resize
from moco_dist.data.decode import cut_pixels
from moco_dist.data.tasks import Crop
from moco_dist.errors import EXIT_PREEMPTED
from moco_dist.evaluate import any_images
from moco_dist.evaluate import features as features_module
from moco_dist.evaluate.subject import FrozenEncoder
from moco_dist.method.backbone import build_resnet
from tests.small_run import draw_statistics
from tests.world import run

SIDE, MEAN, STD = 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights that no random start would give."""
    torch.manual_seed(6)
    network = build_resnet("resnet10")
    draw_statistics(network)
    path = tmp_path_factory.mktemp("any_images") / "theirs.pth"
    torch.save({"state_dict": network.state_dict()}, path)
    return path


@torch.no_grad()
def expected(weights, files):
    """One image after the other through torchvision's own network, in float64."""
    network = build_resnet("resnet10")
    network.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    network.fc = nn.Identity()
    network.double().eval()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    rows = []
    for file in files:
        pixels = np.array(Image.open(file).convert("RGB"))
        height, width = pixels.shape[:2]
        crop = Crop((0, 0, width, height), resized=centre_resize(width, height, round(SIDE * 8 / 7), SIDE))
        view = cut_pixels(pixels, SIDE, [crop])[0].double() / 255
        rows.append(network(((view - mean) / std)[None])[0])
    features = torch.stack(rows)
    assert features.std(0).mean() > 0.01  # no constant
    return features


def write(world, weights, images, out):
    features_module.CHUNK_SAMPLES = 8
    config = EvalConfig(run_dir=out.parent / "parts", data=EvalDataConfig(num_workers=0, batch_size=5))
    opened = any_images.open_backbone(weights, world, "resnet10", image_size=SIDE)
    return len(any_images.write_features(opened, images, out, config, world).paths)


@pytest.mark.slow
def test_two_ranks_write_what_one_image_after_the_other_gives(weights, tiny_data, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    images, out = tiny_data / "val", tmp_path / "features.parquet"
    assert run(write, 2, weights, images, out) == [20, 20]
    table = pq.read_table(out)
    paths = table["path"].to_pylist()
    assert paths == sorted(str(path.relative_to(images)) for path in images.rglob("*.jpg"))
    assert table["class"].to_pylist() == [path.partition("/")[0] for path in paths]
    assert table["label"].to_pylist() == [sorted(set(table["class"].to_pylist())).index(name)
                                          for name in table["class"].to_pylist()]  # fmt: skip
    found = torch.tensor(table["features"].to_pylist(), dtype=torch.float64)
    torch.testing.assert_close(found, expected(weights, [images / path for path in paths]), rtol=1e-4, atol=1e-4)
    model = json.loads(table.schema.metadata[b"moco_dist"])
    assert (model["arch"], model["step"], model["crop"]) == ("resnet10", 0, SIDE)
    assert len(model["weights_sha256"]) == 64


def test_what_was_stopped_goes_on(weights, tiny_data, tmp_path, monkeypatch, capsys):
    """Of images without classes; what is encoded is encoded once."""
    images, out = tmp_path / "images", tmp_path / "features.npz"
    images.mkdir()
    for i, file in enumerate(sorted((tiny_data / "val").rglob("*.jpg"))):
        shutil.copy(file, images / f"{i:02d}.jpg")
    monkeypatch.setattr(features_module, "CHUNK_SAMPLES", 8)
    encoded = []
    original = FrozenEncoder.__call__
    monkeypatch.setattr(FrozenEncoder, "__call__", lambda self, x: (encoded.append(len(x)), original(self, x))[1])
    words = ["features", str(weights), str(images), "--out", str(out), "--arch", "resnet10", "--image-size", str(SIDE),
             "--batch-size", "6", "--num-workers", "0"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(any_images.StopRequest, "is_asked", True)
        assert main(words) == EXIT_PREEMPTED
    assert encoded == [6]
    assert not out.exists()
    assert main([*words, "--page", str(tmp_path / "page.html")]) == 0
    assert sum(encoded) == 20
    page = (tmp_path / "page.html").read_text()
    assert page.count('<figure class="query">') == 8 and page.count('<figure class="">') == 8 * 5
    assert "20 x 512 features" in page and "00.jpg" in page
    (tmp_path / "page.html").unlink()
    assert f"wrote {out}: 20 x 512 features\n" in capsys.readouterr().out
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["features.npz", "images"]
    found = np.load(out, allow_pickle=False)
    assert found["paths"].tolist() == [f"{i:02d}.jpg" for i in range(20)]
    assert set(found["labels"].tolist()) == {-1}
    assert found["classes"].tolist() == []
    plain = expected(weights, [images / path for path in found["paths"]])
    torch.testing.assert_close(torch.from_numpy(found["features"]).double(), plain, rtol=1e-4, atol=1e-4)
    assert main([*words, "--out", str(tmp_path / "half.npz"), "--precision", "fp16"]) == 0
    assert "warning: fp16 on a CPU is many times slower than fp32" in capsys.readouterr().err
