"""`shuffle.exchange`: four ways to the same key views, bit for bit; and ranks that disagree."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.key_views import KeyExchange
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import plan_of
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


WAYS = ["auto", "loader", "all_to_all", "all_gather"]
FIRST, LAST = 2, 5


def config_of(root, exchange="auto", num_workers=0, batch=16, block=None):
    return PretrainConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"root": str(root), "image_size": 32, "num_workers": num_workers},
            "model": {"bn_group_size": 2},
            "optim": {"global_batch_size": batch},
            "shuffle": {"exchange": exchange, "block_size": block},
        }
    )


def views_of(world, config):
    """Query views, key views and the keys' samples of steps FIRST to LAST - 1."""
    folder = find_images(config.data.root, "train")
    plan = plan_of(config, len(folder.paths))
    keys = KeyExchange(config, plan, world)
    batches = list(keys.exchanged(pretrain_batches(folder, config, plan, world, FIRST, LAST), FIRST))
    key_views = [keys.coloured(b, FIRST + i, torch.float32) for i, b in enumerate(batches)]
    samples = [torch.from_numpy(plan.key_indices(step, world)) for step in range(FIRST, LAST)]
    return [b.view_q for b in batches], key_views, samples


def by_every_way(world, ranks_a_host, root, batch, block):
    world = replace(world, local_world_size=ranks_a_host, local_rank=world.rank % ranks_a_host)
    return {way: views_of(world, config_of(root, way, batch=batch, block=block)) for way in WAYS}


@pytest.mark.parametrize(
    ("world_size", "ranks_a_host", "batch", "block"),
    [
        (1, 1, 16, 8), (2, 2, 16, 16), (2, 1, 16, 16), (2, 2, 16, 4), (4, 2, 16, 16), (4, 2, 16, 8), (4, 2, 24, 8),
        (4, 4, 24, 8), (8, 4, 16, 16), (8, 8, 16, 8), (8, 2, 16, 4),
    ],
)  # fmt: skip
def test_all_ways_give_the_same_keys(photos, world_size, ranks_a_host, batch, block):
    """Whatever lies where: blocks on a rank, on ranks of a host or of several, and beside the ranks' bounds."""
    ranks = run(by_every_way, world_size, ranks_a_host, photos, batch, block)
    alone = views_of(World(), config_of(photos, batch=batch, block=block))
    for way in WAYS:
        for part, expected in enumerate(alone):  # the ranks' views together are those of one process
            for step in range(LAST - FIRST):
                assert torch.equal(torch.cat([of_rank[way][part][step] for of_rank in ranks]), expected[step]), way


def test_workers_change_no_pixel(photos):
    inline, with_workers = (views_of(World(), config_of(photos, num_workers=n)) for n in (0, 2))
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
