"""The file that a linear evaluation, a fine-tuning or a detector goes on from."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from moco_dist.evaluate.progress import load_progress, save_progress

FACTS = {"curve": [{"epoch": 1, "loss": 0.5}], "step": 7, "losses": [0.25]}


def trained(steps):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        module(torch.ones(1, 3)).sum().backward()
        sgd.step()
        sgd.zero_grad()
    return module, sgd


def test_it_holds_all_that_the_next_step_needs(tmp_path):
    path = tmp_path / "eval" / "progress.safetensors"
    save_progress(path, *trained(2), FACTS)
    module, sgd = trained(0)
    assert load_progress(path, module, sgd) == FACTS
    module(torch.ones(1, 3)).sum().backward()
    sgd.step()
    assert torch.equal(module.weight, trained(3)[0].weight)


def test_what_a_power_cut_left_of_it_is_not_gone_on_from(tmp_path):
    path = tmp_path / "progress.safetensors"
    save_progress(path, *trained(2), FACTS)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        module, sgd = trained(0)
        assert load_progress(path, module, sgd) == {}
        assert torch.equal(module.weight, trained(0)[0].weight)
    assert load_progress(tmp_path / "none", module, sgd) == {}


@pytest.mark.parametrize(
    "harm", ["no facts", "facts that are none", "facts of another kind", "another shape", "a tensor is missing"]
)
def test_what_is_crafted_is_not_gone_on_from_in_part(tmp_path, harm):
    path = tmp_path / "progress.safetensors"
    save_progress(path, *trained(2), FACTS)
    tensors, facts = safetensors.torch.load_file(path), {"progress": json.dumps(FACTS)}
    if harm == "another shape":
        tensors["bias"] = torch.zeros(3)
    if harm == "a tensor is missing":
        del tensors["bias"]
    if harm.startswith("facts"):
        facts = {"progress": "[1]" if harm == "facts of another kind" else "[" * 100_000}
    safetensors.torch.save_file(tensors, path, None if harm == "no facts" else facts)
    module, sgd = trained(0)
    assert load_progress(path, module, sgd) == {}
    assert torch.equal(module.weight, trained(0)[0].weight)
