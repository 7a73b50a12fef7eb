"""A sample's two views are drawn independently: were they one view, training would be ruined and no loss would tell."""

import numpy as np
import pytest
import torch

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import counter_rng
from moco_dist.data.colours import COLOUR_COLUMNS, apply_colours
from moco_dist.data.key_views import KeyExchange
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.data.tasks import view_task
from moco_dist.distributed.world import World

SAMPLES = 4000
CROPS = ("left", "top", "right", "bottom", "flip")


def draws_of():
    """(N, P) of the query's and of the key's crops and colours, row by row of the same sample."""
    config = PretrainConfig.model_validate({"run": {"dir": "unused"}, "data": {"root": "unused"}})
    task = view_task(5, config, Plan(SAMPLES, SAMPLES, 3), World())
    batch = task.finish(torch.empty(2 * SAMPLES, 0), ())
    boxes = np.array([[*crop.box, crop.flip] for crop in (task.crop(row, 500, 375) for row in range(2 * SAMPLES))])
    order_q, order_k = (np.argsort(samples.numpy()) for samples in (batch.samples_q, batch.samples_k))
    query = np.hstack([boxes[:SAMPLES][order_q], batch.colours_q.numpy()[order_q]])
    return query, np.hstack([boxes[SAMPLES:][order_k], batch.colours_k.numpy()[order_k]])


def related(query, key):
    """Names of the parameters that are alike in both views more than chance makes them."""
    names = CROPS + COLOUR_COLUMNS
    return [name for i, name in enumerate(names)
            if abs(np.corrcoef(query[:, i], key[:, i])[0, 1]) > 5 / SAMPLES**0.5]  # fmt: skip


def test_no_parameter_of_one_view_tells_the_other_s():
    query, key = draws_of()
    assert related(query, key) == []
    assert (abs(query.mean(0) - key.mean(0)) < 0.1 * query.std(0)).all()  # and both have one distribution


@pytest.mark.parametrize(
    ("streams", "alike"),
    [
        ([("STREAM_CROP_K", "STREAM_CROP_Q")], set(CROPS)),
        ([("STREAM_COLOUR_K", "STREAM_COLOUR_Q")], set(COLOUR_COLUMNS)),
        ([("STREAM_CROP_K", "STREAM_CROP_Q"), ("STREAM_COLOUR_K", "STREAM_COLOUR_Q")], {*CROPS, *COLOUR_COLUMNS}),
    ],
)
def test_a_key_that_is_drawn_from_the_query_s_stream_is_noticed(monkeypatch, streams, alike):
    for theirs, ours in streams:
        monkeypatch.setattr(counter_rng, theirs, getattr(counter_rng, ours))
    assert set(related(*draws_of())) == alike


@pytest.mark.parametrize("exchange", ["auto", "all_gather"])
@pytest.mark.parametrize("colours", [False, True], ids=["crops alone", "colours alone"])
def test_the_pixels_of_a_pair_differ(tiny_data, exchange, colours):
    """As the encoders get them, whoever moves crops and colours about on the way."""
    alone = {"crop_scale": [1.0, 1.0], "flip_probability": 0} if colours else {"recipe": "v1", "jitter_probability": 0,
                                                                               "grayscale_probability": 0}  # fmt: skip
    config = PretrainConfig.model_validate({
        "run": {"dir": "unused"}, "data": {"root": tiny_data, "image_size": 64, "num_workers": 0}, "augment": alone,
        "optim": {"global_batch_size": 64}, "shuffle": {"exchange": exchange},
    })  # fmt: skip
    plan, world = Plan(80, 64, 0), World()
    (batch,) = pretrain_batches(find_images(tiny_data, "train"), config, plan, world, 0, 1)
    query = apply_colours(batch.view_q, batch.colours_q, config.augment)
    key = KeyExchange(config, plan, world).coloured(batch, 0, torch.float32)
    query_of = np.argsort(plan.query_indices(0, world))
    key_of = np.argsort(plan.key_indices(0, world))
    different = (query[query_of] - key[key_of]).abs().mean((1, 2, 3)) > 0.01
    assert different.float().mean() > (0.8 if colours else 0.95)
