"""What is 16-bit and what is not, and a loss scale that is too large."""

import pytest
import torch

from moco_dist.data.plan import Plan
from moco_dist.data.views import Views
from moco_dist.distributed.world import World
from moco_dist.method.batch_norm import running_statistics
from moco_dist.method.build import build_method
from tests.distributed.program import images, small_config

TINY = {"embedding_dim": 16, "head_hidden_dims": [24], "arch": "resnet10", "bn_group_size": 8}


def started(precision, optimizer="sgd"):
    """A run on 16 samples, and a function that takes a step of it."""
    config = small_config(model=TINY, optim={"precision": precision, "optimizer": optimizer, "global_batch_size": 16})
    method = build_method(config, World())
    views = images(next(method.query_encoder.parameters()).dtype)[:16, 0]
    order = torch.from_numpy(Plan(160, 16, 0).key_permutation(0))
    return method, lambda: method.train_step(Views(views, views, order), 0.01, True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_only_the_encoders_are_16_bit(precision):
    method, step = started(precision)
    convolved = []
    method.query_encoder.backbone.conv1.register_forward_hook(lambda _, __, out: convolved.append(out.dtype))
    result = step()
    wide = torch.float64 if precision == "fp64" else torch.float32
    assert convolved == [{"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, wide)]
    tensors = [
        result.loss, method.queue.keys, *method.query_encoder.parameters(), *method.key_encoder.parameters(),
        *method.engine.optimizer_tensors().values(), *running_statistics(method.query_encoder).values(),
    ]  # fmt: skip
    assert {x.dtype for x in tensors} == {wide}
    assert all(torch.isfinite(x).all() for x in tensors)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_loss_scale_that_is_too_large_costs_a_step_and_no_more(optimizer):
    method, step = started("fp16", optimizer)
    method.engine.scaler.load_state_dict({**method.engine.scaler.state_dict(), "scale": 2.0**40})
    before = {name: p.clone() for name, p in method.query_encoder.named_parameters()}
    step()
    assert method.engine.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in method.query_encoder.named_parameters())
    assert all(not x.any() for x in method.engine.optimizer_tensors().values())
    method.engine.scaler.update(2.0**10)
    step()
    assert method.engine.scaler.get_scale() == 2.0**10
    assert any(not torch.equal(p, before[name]) for name, p in method.query_encoder.named_parameters())
