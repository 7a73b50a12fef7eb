"""Fine-tuning on one and four ranks against plain PyTorch in float64 on one process, which sees the whole batch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from moco_dist.config.evaluate import FinetuneConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import to_yaml
from moco_dist.data.loaders import eval_batches
from moco_dist.datasets.prepare import prepare_shapes
from moco_dist.distributed.world import World
from moco_dist.evaluate.batches import crop_batches, global_batches
from moco_dist.evaluate.classifiers import initial_classifier
from moco_dist.evaluate.finetune import batch_of_groups, finetune
from moco_dist.evaluate.subject import frozen_copy, open_evaluation
from moco_dist.method.encoder import build_encoder
from tests.distributed.program import largest_difference
from tests.world import run

GROUP, BATCH, EPOCHS = 4, 16, 3
SCALE = (0.3, 1.0)  # not the default


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that has only settings."""
    folder = tmp_path_factory.mktemp("finetune")
    data = prepare_shapes(folder / "shapes", num_train=70, num_val=23)
    config = PretrainConfig.model_validate({
        "run": {"dir": str(folder / "run")},
        "data": {"root": str(data), "image_size": 32, "num_workers": 0},
        "model": {"arch": "resnet10", "bn_group_size": GROUP},
    })  # fmt: skip
    config.run.dir.mkdir()
    (config.run.dir / "config.yaml").write_text(to_yaml(config))
    return config.run.dir


def opened(run_dir, world):
    config = FinetuneConfig.model_validate({
        "run_dir": str(run_dir), "epochs": EPOCHS, "milestones": [2], "global_batch_size": BATCH, "backbone_lr": 0.002,
        "classifier_lr": 0.01, "crop_scale": SCALE, "data": {"num_workers": 0, "batch_size": 8},
    })  # fmt: skip
    evaluation = dataclasses.replace(open_evaluation(config, world), dtype=torch.float64)
    encoder = frozen_copy(build_encoder(evaluation.pretrain.model, 3).double(), 0, evaluation)
    return config, evaluation, encoder


def ours(world, run_dir):
    config, evaluation, encoder = opened(run_dir, world)
    accuracy, curve, per_class = finetune(evaluation, config, encoder, batch_of_groups(evaluation, config))
    losses = [point["loss"] for point in curve]
    return {"losses": losses, "accuracy": accuracy, "per_class": per_class, "weights": encoder.module.state_dict()}


def plain(run_dir):
    """nn.BatchNorm2d group by group, one SGD with two groups, all validation images in one list."""
    config, evaluation, encoder = opened(run_dir, World())
    num_classes = len(evaluation.train.classes)
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.load_state_dict(encoder.module.state_dict(), strict=False)
    model.fc = initial_classifier(512, num_classes, config.seed)
    model.double()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    backbone = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": backbone, "lr": 0.002}, {"params": model.fc.parameters(), "lr": 0.01}]
    sgd = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[..., None, None]
    labels, losses = torch.from_numpy(evaluation.train.labels), []
    for epoch in range(EPOCHS):
        if epoch == 2:
            for group in sgd.param_groups:
                group["lr"] *= 0.2
        batches = global_batches(len(labels), BATCH, config.seed, epoch)
        epoch_losses = []
        for views, rows in zip(crop_batches(evaluation, batches, SCALE, 0, epoch), batches, strict=True):
            before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
            for norm in norms:  # the plain mean over the groups of this step
                norm.reset_running_stats()
                norm.momentum = None
            logits = torch.cat([model(group) for group in ((views.double() / 255 - mean) / std).split(GROUP)])
            loss = F.cross_entropy(logits, labels[torch.from_numpy(rows)])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            for norm, (old_mean, old_var) in zip(norms, before, strict=True):
                norm.running_mean.lerp_(old_mean, 0.9)
                norm.running_var.lerp_(old_var, 0.9)
            epoch_losses.append(loss.item())
        losses.append(sum(epoch_losses) / len(epoch_losses))
    model.eval()
    val, hits = evaluation.val, []
    data = evaluation.config.data
    for views, rows in eval_batches(val, torch.arange(23).numpy(), data, evaluation.resize, evaluation.crop, World()):
        with torch.no_grad():
            top5 = model((views.double() / 255 - mean) / std).topk(5, dim=1).indices
        hits.append(top5 == torch.from_numpy(val.labels[rows])[:, None])
    hits = torch.cat(hits)
    accuracy = {
        "finetune_top1": 100 * hits[:, 0].double().mean().item(), "finetune_top5": 100 * hits.sum().item() / len(hits)
    }  # fmt: skip
    per_class = [100 * hits[val.labels == c, 0].double().mean().item() for c in range(num_classes)]
    return {"losses": losses, "accuracy": accuracy, "per_class": per_class, "weights": model.state_dict()}


@pytest.fixture(scope="module")
def expected(run_dir):
    return plain(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_equals_plain_pytorch(run_dir, expected, world_size):
    assert expected["losses"][-1] < expected["losses"][0] - 0.05
    for found in run(ours, world_size, run_dir):
        assert largest_difference(found["losses"], expected["losses"]) < 1e-9
        assert found["accuracy"] == pytest.approx(expected["accuracy"])
        assert found["per_class"] == pytest.approx(expected["per_class"], nan_ok=True)
        for name, tensor in found["weights"].items():
            if "num_batches" not in name:
                assert largest_difference(tensor, expected["weights"][name]) < 1e-9, name
