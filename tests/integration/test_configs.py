"""Every file of configs/ builds its model and does a step; the rows of the paper are as published."""

from pathlib import Path

import pytest
import torch
import yaml

from moco_dist.config.evaluate import FinetuneConfig, LinearConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.data.views import Views
from moco_dist.distributed.world import World
from moco_dist.method.build import build_method
from moco_dist.method.encoder import build_encoder

EVALUATIONS = {"linear", "finetune", "detection"}
CONFIGS = [path for path in sorted(Path("configs").glob("*.yaml")) if not EVALUATIONS & set(path.stem.split("_"))]
GROUP, SIDE = 4, 32


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_does_one_step(path):
    """With its network, method, head, optimiser and engine, on a small batch of small images."""
    is_overlay = "run" not in yaml.safe_load(path.read_text())
    base = Path("configs/mocov2_r50_200ep.yaml")
    given = read_config(PretrainConfig, base if is_overlay else path, [], [path] if is_overlay else [])
    config = PretrainConfig.model_validate({
        **given.model_dump(),
        "model": {**given.model.model_dump(), "bn_group_size": GROUP},
        "moco": {**given.moco.model_dump(), "queue_size": 8 * GROUP},
        "optim": {**given.optim.model_dump(), "global_batch_size": 2 * GROUP, "precision": "fp32"},
    })  # fmt: skip
    world = World()
    method = build_method(config, world)
    views = torch.randn(2, 2 * GROUP, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    before = {name: p.detach().clone() for name, p in method.query_encoder.named_parameters()}
    result = method.train_step(Views(views[0], views[1], torch.arange(2 * GROUP)), 0.1, True)
    assert torch.isfinite(result.loss)
    changed = [name for name, p in method.query_encoder.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > len(before) // 2


@pytest.mark.parametrize(("name", "fraction", "weight_decay"), [("1pct", 0.01, 5e-4), ("10pct", 0.1, 1e-4)])
def test_fine_tuning_is_as_published(name, fraction, weight_decay):
    config = read_config(FinetuneConfig, Path(f"configs/finetune_r50_{name}.yaml"), ["--run-dir", "runs/x"])
    assert (config.data.label_fraction, config.weight_decay) == (fraction, weight_decay)
    assert (config.epochs, config.global_batch_size, config.milestones, config.lr_decay) == (20, 256, (12, 16), 0.2)
    assert (config.backbone_lr, config.classifier_lr, config.sgd_momentum) == (0.01, 1.0, 0.9)


def test_the_small_head_is_what_it_says():
    config = read_config(PretrainConfig, Path("configs/resnet18_small_head.yaml"), [])
    head = build_encoder(config.model, 0).head
    assert [(layer.in_features, layer.out_features) for layer in head[::2]] == [(512, 100), (100, 50), (50, 25)]
    assert all(isinstance(layer, torch.nn.ReLU) for layer in head[1::2])
    assert read_config(LinearConfig, Path("configs/resnet18_small_head_linear.yaml"), []).transfer.keep_head_layers == 1


PUBLISHED = {  # DESIGN of each row: recipe, head, temperature, schedule, epochs
    "mocov1_r50_200ep": ("v1", (), 0.07, "step", 200),
    "mocov2_a_r50_200ep": ("v1", (2048,), 0.2, "step", 200),
    "mocov2_b_r50_200ep": ("v2", (), 0.07, "step", 200),
    "mocov2_c_r50_200ep": ("v2", (2048,), 0.2, "step", 200),
    "mocov2_r50_200ep": ("v2", (2048,), 0.2, "cosine", 200),
    "mocov2_r50_800ep": ("v2", (2048,), 0.2, "cosine", 800),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_of_table_1_is_as_published(name):
    config = read_config(PretrainConfig, Path(f"configs/{name}.yaml"), [])
    optim = config.optim
    row = (config.augment.recipe, config.model.head_hidden_dims, config.moco.temperature, optim.schedule, optim.epochs)
    assert row == PUBLISHED[name]
    assert (optim.base_lr, optim.global_batch_size, optim.weight_decay, optim.sgd_momentum) == (0.03, 256, 1e-4, 0.9)
    assert (config.moco.queue_size, config.moco.momentum, config.model.embedding_dim) == (65536, 0.999, 128)
    assert (config.model.arch, config.model.bn_group_size, config.data.image_size) == ("resnet50", 32, 224)
    assert optim.schedule_unit == "epoch"
    if optim.schedule == "step":
        assert optim.milestones == (120, 160)
