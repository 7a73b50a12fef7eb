"""Linear classifiers trained side by side on the same features: the published recipe, and a sweep of others.

Every rank has all features of a batch (one all-gather of B x D numbers, less than the gradients of one classifier) and
trains all classifiers, so no gradient crosses the network and the number of ranks changes nothing, not even rounding.
Recipe number 0 is the published one, on every training image. The others leave out a part of the training set, which
then chooses the best of them. The validation images never choose: their accuracy is the result.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco_dist.config.evaluate import LinearConfig
from moco_dist.data.batch import to_device
from moco_dist.data.images import share_of_classes
from moco_dist.distributed.collectives import all_gather, all_reduce_sum
from moco_dist.distributed.stop import StopRequest
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.engine.schedule import step_decay
from moco_dist.errors import UserError
from moco_dist.evaluate.batches import batches_in_epoch
from moco_dist.evaluate.features import Features
from moco_dist.evaluate.progress import Training

CURVE_POINTS = 20
# From an epoch, and how many of its batches to pass over, to batches: features (B, D) on the device, the same on all
# ranks, and the B numbers of their images.
Feed = Callable[[int, int], Iterator[tuple[Tensor, NDArray[np.int64]]]]


@dataclass(frozen=True)
class Recipe:
    """How one classifier is trained."""

    lr: float
    weight_decay: float


@dataclass
class Outcome:
    """What came out.

    Attributes:
        accuracy: percent: linear_top1 and linear_top5 of the published recipe, and linear_best_top1 and _top5 of the
            sweep's best.
        curve: a dict an epoch, of the published recipe: mean loss, after some epochs the validation top-1.
        per_class: top-1 in percent of the published recipe, by number of the class; nan where it has no image.
        sweep: each other recipe with its top-1 on the held-out images, None where its loss was no number any more.
    """

    accuracy: dict[str, float]
    curve: list[dict[str, float]]
    per_class: list[float]
    sweep: list[dict[str, Any]]


class Classifiers(nn.Module):
    """R linear classifiers whose logits come from one matrix product."""

    def __init__(self, count: int, dim: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([initial_classifier(dim, num_classes, seed) for _ in range(count)])

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) to (N, R, C)."""
        weights = torch.cat([head.weight for head in self.heads])  # type: ignore[misc]
        biases = torch.cat([head.bias for head in self.heads])  # type: ignore[misc]
        return F.linear(features, weights, biases).view(len(features), len(self.heads), -1)


def initial_classifier(dim: int, num_classes: int, seed: int) -> nn.Linear:
    """Weights N(0, 0.01) and biases 0, the same for the same seed."""
    classifier = nn.Linear(dim, num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def recipes_of(config: LinearConfig) -> list[Recipe]:
    """The published one (or what the config says instead), then the sweep's grid."""
    grid = [Recipe(lr, decay) for lr in config.sweep.lrs for decay in config.sweep.weight_decays]
    return [Recipe(config.lr, config.weight_decay), *grid]


def held_out(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """(N,) which training images choose the sweep's best: `share` of every class that has two or more."""
    return share_of_classes(labels, share, [5, seed], leave=1)


def train_classifiers(
    feed: Feed,
    train_labels: NDArray[np.int64],
    val: Features,
    held_out_features: Callable[[], Features] | None,
    num_classes: int,
    config: LinearConfig,
    world: World,
    progress: Path | None = None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Train all recipes. Called by all ranks.

    Args:
        feed: an epoch's batches.
        train_labels: (N,) of all training images.
        val: this rank's validation features.
        held_out_features: this rank's features of the images that `held_out` names; None without a sweep.
        num_classes: C, size of the output.
        config: the recipes.
        world: this process.
        progress: a file to keep the classifiers in, and to go on from.
        stop: who may ask for an end; None: nobody.

    Raises:
        UserError: the published recipe's loss is not finite any more.
        Preempted: somebody asked for an end.
    """
    recipes, device = recipes_of(config), val.values.device
    classifiers = Classifiers(len(recipes), val.values.shape[1], num_classes, config.seed).to(device)
    groups = [
        {"params": list(head.parameters()), "lr": recipe.lr, "weight_decay": recipe.weight_decay}
        for head, recipe in zip(classifiers.heads, recipes, strict=True)
    ]
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum)
    is_left_out = held_out(train_labels, config.sweep.held_out_share, config.seed)
    labels = torch.tensor(train_labels, device=device)
    training = Training(progress, classifiers, sgd, stop, world)
    curve, per_epoch = training.curve, batches_in_epoch(len(labels), config.global_batch_size)
    accuracy = top_accuracies(classifiers.heads[0], val, world)
    with Told("linear classifier", config.epochs * per_epoch, "steps", world, training.step) as told:
        for epoch in range(len(curve), config.epochs):
            for group, recipe in zip(sgd.param_groups, recipes, strict=True):
                group["lr"] = recipe.lr * step_decay(config.milestones, epoch)
            for features, rows in feed(epoch, training.step - epoch * per_epoch):
                losses = _losses(classifiers(features), labels[to_device(rows, device)], is_left_out[rows])
                losses.sum().backward()  # the classifiers share nothing
                sgd.step()
                sgd.zero_grad()
                training.add(losses[0])
                told.add(note=f"epoch {epoch + 1}")
            mean_loss = training.mean_loss()
            if not math.isfinite(mean_loss):
                raise UserError(f"the linear classifier's loss is {mean_loss}; an lr below {config.lr:g} may be stable")
            curve.append({"epoch": epoch + 1, "loss": mean_loss})
            if (epoch + 1) % max(1, config.epochs // CURVE_POINTS) == 0 or epoch + 1 == config.epochs:
                accuracy = top_accuracies(classifiers.heads[0], val, world)
                curve[-1]["top1"] = accuracy["linear_top1"]
    training.save()
    outcome = Outcome(accuracy, curve, per_class_accuracy(classifiers.heads[0], val, num_classes, world), [])
    if held_out_features is not None:
        _choose(outcome, classifiers, recipes, held_out_features(), val, world)
    return outcome


def _losses(logits: Tensor, labels: Tensor, is_left_out: NDArray[np.bool_]) -> Tensor:
    """(R,) each recipe's mean loss over its images of the batch: the first takes all, the others skip some."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(-1, logits.shape[1]), reduction="none")
    taken = to_device(~is_left_out, losses.device).to(losses.dtype)[:, None]
    others = (losses[:, 1:] * taken).sum(0) / max(1, int((~is_left_out).sum()))
    return torch.cat([losses[:, :1].mean(0), others])


def _choose(
    outcome: Outcome, classifiers: Classifiers, recipes: list[Recipe], left_out: Features, val: Features, world: World
) -> None:
    """Fill `outcome` in with the sweep, and with the accuracy of its best by the held-out images."""
    best, best_top1 = 0, -1.0
    for number, (head, recipe) in enumerate(zip(classifiers.heads, recipes, strict=True)):
        if number == 0:
            continue
        is_sound = all(torch.isfinite(p).all() for p in head.parameters())
        top1 = top_accuracies(head, left_out, world)["linear_top1"] if is_sound else None
        outcome.sweep.append({"lr": recipe.lr, "weight_decay": recipe.weight_decay, "held_out_top1": top1})
        if top1 is not None and top1 > best_top1:
            best, best_top1 = number, top1
    if best:
        found = top_accuracies(classifiers.heads[best], val, world)
        outcome.accuracy |= {name.replace("linear", "linear_best"): value for name, value in found.items()}
        outcome.sweep[best - 1]["is_best"] = True


def together(own: Tensor, owner: NDArray[np.int64], world: World) -> Tensor:
    """A batch's features on all ranks, from those that each rank has.

    Args:
        own: (n, D) this rank's, in the batch's order.
        owner: (B,) the rank that has each sample of the batch.
        world: this process.

    Returns:
        (B, D) in the batch's order. Receives (W - 1) max(n) D numbers.
    """
    if world.world_size == 1:
        return own
    counts = np.bincount(owner, minlength=world.world_size)
    padded = own.new_zeros(counts.max(), own.shape[1])
    padded[: len(own)] = own
    gathered = all_gather(padded, world)
    by_rank = np.argsort(owner, kind="stable")
    place = np.empty(len(owner), dtype=np.int64)
    place[by_rank] = np.concatenate([rank * counts.max() + np.arange(count) for rank, count in enumerate(counts)])
    return gathered[to_device(place, own.device)]


@torch.no_grad()
def top_accuracies(classifier: nn.Module, val: Features, world: World, kind: str = "linear") -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent over all ranks' samples (top-C where there are C < 5 classes).

    Args:
        classifier: of features.
        val: this rank's share of the validation features.
        world: this process.
        kind: what the names of the result begin with.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=val.values.device)
    for values, labels in zip(val.values.split(4096), val.labels.split(4096), strict=True):
        logits = classifier(values)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum()])
    top1, top5 = all_reduce_sum(counts, world).tolist()
    return {f"{kind}_top1": 100 * top1 / val.total, f"{kind}_top5": 100 * top5 / val.total}


@torch.no_grad()
def per_class_accuracy(classifier: nn.Module, val: Features, num_classes: int, world: World) -> list[float]:
    """Top-1 accuracy in percent of each class, over all ranks' samples; nan where a class has none."""
    counts = torch.zeros(2, num_classes, dtype=torch.int64, device=val.values.device)
    for values, labels in zip(val.values.split(4096), val.labels.split(4096), strict=True):
        is_right = classifier(values).argmax(1) == labels
        counts.index_add_(1, labels, torch.stack([is_right, torch.ones_like(is_right)]).long())
    right, total = all_reduce_sum(counts, world).double()
    return (100 * right / total).tolist()
