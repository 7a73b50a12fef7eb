"""`shuffle.exchange`: three ways to the same key views, bit for bit; and ranks that disagree."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.key_views import key_views
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.distributed.agreement import require_agreement
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from tests.world import run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 JPEGs in class folders, of sizes at which they are decoded whole and at 1/2, 1/4 and 1/8."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        (root / f"class_{i % 3}").mkdir(exist_ok=True)
        width, height = (40 + i) * 2 ** (i % 6), (60 - i) * 2 ** (i % 6)
        rough = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((width, height)).save(root / f"class_{i % 3}" / f"{i:02d}.jpg")
    return root


def config_of(root, exchange="loader", num_workers=0):
    return PretrainConfig.model_validate({
        "run": {"dir": "unused"},
        "data": {"root": str(root), "image_size": 24, "num_workers": num_workers},
        "model": {"bn_group_size": 2},
        "optim": {"global_batch_size": 8},
        "shuffle": {"exchange": exchange},
    })


def views_of(world, root, exchange, num_workers=0):
    config = config_of(root, exchange, num_workers)
    folder = find_images(root, "train")
    plan = Plan(len(folder.paths), 8, 0)
    batches = list(pretrain_batches(folder, config, plan, world, 2, 5))
    keys = [key_views(b, config, plan, 2 + i, world, torch.float32) for i, b in enumerate(batches)]
    return [b.view_q for b in batches], keys, [plan.key_indices(2 + i, world).tolist() for i in range(3)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ways_give_the_same_keys(photos, world_size):
    expected = run(views_of, world_size, photos, "loader")
    alone_q, alone_k, _ = views_of(World(), photos, "loader")
    for step in range(3):  # the ranks' views together are those of one process
        assert torch.equal(torch.cat([queries[step] for queries, _, _ in expected]), alone_q[step])
        assert torch.equal(torch.cat([keys[step] for _, keys, _ in expected]), alone_k[step])
    for exchange in ("all_to_all", "all_gather"):
        for ours, theirs in zip(run(views_of, world_size, photos, exchange), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True))
            assert ours[2] == theirs[2]


def test_workers_change_no_pixel(photos):
    inline, with_workers = views_of(World(), photos, "loader", 0), views_of(World(), photos, "loader", 2)
    assert all(torch.equal(a, b) for a, b in zip(inline[0] + inline[1], with_workers[0] + with_workers[1], strict=True))


def disagree(world, facts_by_rank):
    try:
        require_agreement(facts_by_rank[world.rank], world)
    except UserError as error:
        return str(error)
    return None


def test_ranks_that_disagree_are_named():
    same = {"run.seed": 0, "number of images": 100}
    assert run(disagree, 3, [same, same, same]) == [None] * 3
    other = {"run.seed": 1, "number of images": 100}
    assert run(disagree, 3, [same, other, same]) == ["ranks disagree on run.seed: 0 on rank 0, 2; 1 on rank 1"] * 3
    missing = {"run.seed": 0}
    assert "number of images: 100 on rank 0; null on rank 1" in run(disagree, 2, [same, missing])[0]
