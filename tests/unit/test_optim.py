"""Learning-rate functions by hand, and LARS against its formula."""

import itertools
import math

import pytest
import timm
import torch
from torch import nn

from moco_dist.config.pretrain import OptimConfig
from moco_dist.engine.optimizer import LARS, build_optimizer
from moco_dist.engine.schedule import learning_rate, learning_rate_formula


def test_cosine_per_epoch_as_published():
    config = OptimConfig(epochs=200)
    rates = [learning_rate(config, step, 10) for step in (0, 9, 10, 1000, 1999)]
    assert rates[0] == rates[1] == 0.03
    assert rates[2] == pytest.approx(0.015 * (1 + math.cos(math.pi / 200)))
    assert rates[3] == pytest.approx(0.015)
    assert rates[4] == pytest.approx(0.015 * (1 + math.cos(math.pi * 199 / 200)))


def test_cosine_per_step_is_smooth():
    config = OptimConfig(epochs=2, schedule_unit="step")
    rates = [learning_rate(config, step, 10) for step in range(20)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[10] == pytest.approx(0.015)


def test_v1_steps():
    config = OptimConfig(schedule="step")
    assert [round(learning_rate(config, e, 1), 9) for e in (119, 120, 159, 160)] == [0.03, 0.003, 0.003, 0.0003]


def test_scaling_and_warmup():
    large = OptimConfig(global_batch_size=4096, warmup_epochs=2)
    assert learning_rate(large, 20, 10) == pytest.approx(0.03 * 16 * (1 + math.cos(math.pi * 2 / 200)) / 2)
    assert [learning_rate(large, s, 10) for s in (0, 9, 19)] == pytest.approx([0.48 / 20, 0.24, 0.48])
    assert learning_rate_formula(large) == "lr = 0.03 x 4096 / 256 = 0.48"
    root = OptimConfig(global_batch_size=4096, lr_scaling="sqrt", base_lr=0.075)
    assert learning_rate_formula(root) == "lr = 0.075 x sqrt(4096 / 256) = 0.3"
    assert learning_rate(OptimConfig(global_batch_size=4096, lr_scaling="none"), 0, 10) == 0.03


def test_adamw_decays_neither_norms_nor_biases_nor_position_embeddings():
    network = timm.create_model("test_vit", num_classes=0)
    optimizer = build_optimizer(network, OptimConfig(optimizer="adamw", weight_decay=0.1))
    decayed, not_decayed = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    named = dict(network.named_parameters())
    assert decayed | not_decayed == {id(p) for p in named.values()} and not decayed & not_decayed
    without = {name for name, p in named.items() if id(p) in not_decayed}
    assert without == {n for n, p in named.items() if p.ndim == 1} | {"pos_embed"} | ({"cls_token"} & named.keys())
    assert "patch_embed.proj.weight" not in without
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_lars_is_its_formula():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = LARS(list(model.parameters()), momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    buffer_w, buffer_b = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.5 + step
        model.weight.grad, model.bias.grad = torch.randn(3, 4).double(), torch.randn(3).double()
        d = model.weight.grad + 0.1 * w
        buffer_w = 0.9 * buffer_w + 0.01 * w.norm() / d.norm() * d
        buffer_b = 0.9 * buffer_b + model.bias.grad
        w, b = w - (0.5 + step) * buffer_w, b - (0.5 + step) * buffer_b
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), w)
        torch.testing.assert_close(model.bias.detach(), b)


def test_lars_of_a_zero_weight_takes_the_plain_rate():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([weight], momentum=0.0, weight_decay=0.1, trust_coefficient=0.01)
    optimizer.param_groups[0]["lr"] = 1.0
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -torch.ones(2, 2))


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_buffers_exist_from_the_start(name):
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(optimizer=name))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], torch.zeros_like(p)) for p in model.parameters())
