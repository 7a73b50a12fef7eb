"""What tests of the loaders share: pictures, a small config, its batches, and how near two loaders' batches are."""

import os

import numpy as np
import torch
from PIL import Image

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import dali as dali_loader
from moco_dist.data.decode import decode_image
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.distributed.world import World

BATCH, SIZE = 8, 64


def picture(seed, width, height):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 5, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def config_of(root, loader, exchange="loader", **data):
    return PretrainConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"root": str(root), "loader": loader, "image_size": SIZE, "num_workers": 0, **data},
            "model": {"bn_group_size": 2},
            "optim": {"global_batch_size": BATCH},
            "shuffle": {"exchange": exchange},
        }
    )


def batches_of(config, start=0, stop=3, world=None):
    folder = find_images(config.data.root, "train")
    plan = Plan(len(folder.paths), min(BATCH, len(folder.paths)), config.run.seed)
    return list(pretrain_batches(folder, config, plan, world or World(), start, stop))


def assert_same(ours, theirs, mean=0.0, most=0):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.samples_q, b.samples_q) and torch.equal(a.samples_k, b.samples_k)
        assert torch.equal(a.colours_q, b.colours_q) and torch.equal(a.colours_k, b.colours_k)
        for x, y in ((a.view_q, b.view_q), (a.view_k, b.view_k)):
            difference = (x.int() - y.int()).abs()
            assert difference.max() <= most
            assert difference.float().mean() <= mean


def undamaged(root):
    """A set of eight images."""
    root.mkdir(exist_ok=True)
    for i in range(8):
        picture(i, 90 + i, 110).save(root / f"{i}.jpg")


def damaged(root, name):
    """The same, with something else in the place of one; its path."""
    undamaged(root)
    bad = root / "3.jpg"
    content = bad.read_bytes()
    if name == "missing":
        bad.unlink()
    elif name == "directory":
        bad.unlink()
        bad.mkdir()
    elif name == "pipe":
        bad.unlink()
        os.mkfifo(bad)
    else:
        at = len(content) // 2
        bad.write_bytes(
            {
                "empty": b"",
                "one byte": b"\xff",
                "text": b"<html>404</html>",
                "truncated": content[:at],
                "no end": content[:-2],
                "header only": content[:300],
                "random": np.random.default_rng(0).bytes(4000),
            }[name]
        )
    return bad


def sizes_known_already(monkeypatch, root):
    """DALI's loader has seen all headers, as in a run's second epoch: it finds out about damage by decoding."""
    sizes = [decode_image(path.read_bytes(), "").size for path in sorted(root.glob("*.jpg"))]
    monkeypatch.setattr(dali_loader._Batches, "_size_of", lambda self, sample: sizes[sample])
