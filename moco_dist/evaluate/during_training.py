"""What a pre-training measures of itself: kNN, a linear probe and RankMe on the same frozen features of a sample.

The probe is ridge regression onto the classes' indicators, in closed form: nothing to tune, and a fraction of the time
that encoding the sample takes. It follows linear evaluation without being as good: `moco-dist linear` is the result.
"""

import torch
import torch.nn.functional as F
from torch import nn

from moco_dist.config.evaluate import EvalConfig, EvalDataConfig
from moco_dist.config.loading import LoadingConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.images import ImageFolder, subset
from moco_dist.distributed.collectives import all_reduce_sum
from moco_dist.distributed.world import World
from moco_dist.engine.precision import compute_dtype
from moco_dist.evaluate.features import Features, extract, standardise
from moco_dist.evaluate.knn import knn_accuracy
from moco_dist.evaluate.subject import Evaluation, frozen_copy, labelled_images
from moco_dist.run.folder import RunFolder
from moco_dist.run.known_data import remember

TRAINING_K, TRAINING_TEMPERATURE = 20, 0.07
# A share of the mean variance along a direction. On Fashion-MNIST, with 512 dimensions and 600 to 16,000 images, it is
# within a point of the best of 0.0001 to 3; less is better for many images, more for few.
RIDGE = 0.01
CHUNK = 4096  # rows at once
EPSILON = 1e-7  # RankMe's, for float32 features


class Probe:
    """Accuracies of the encoder while it is trained, every `log.knn_every_epochs` epochs. All ranks call the same."""

    def __init__(
        self, config: PretrainConfig, images: ImageFolder, steps_per_epoch: int, stop: int, world: World
    ) -> None:
        """For the run of `config` over `images`, which ends at step `stop`.

        Raises:
            UserError: there is no validation set, or some images have no class. It is raised now, not after an epoch.
        """
        self._every_steps, self._stop = config.log.knn_every_epochs * steps_per_epoch, stop
        self._has_classes = bool(images.classes)
        self._evaluation = _evaluation(config, images, world) if self._every_steps else None

    def notes(self) -> list[str]:
        """What a person is to know of it at the start."""
        alone = "the images have no classes, so log.knn_every_epochs measures RankMe alone, no kNN and no linear probe"
        return [alone] if self._evaluation and not self._has_classes else []

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps; after the last one too."""
        return bool(self._every_steps) and (step % self._every_steps == 0 or step == self._stop)

    def measure(self, encoder: nn.Module) -> dict[str, float]:
        """Top-1 in percent and RankMe, on the images that `config.log` asks for. Called by all ranks.

        Args:
            encoder: the query encoder in training; it is copied, with its running statistics averaged over ranks.

        Returns:
            knn_top1, by 20 neighbours, probe_top1, by `ridge_accuracy`, and rankme of the training images; the same on
            all ranks. Of images without classes, rankme alone.
        """
        evaluation = self._evaluation
        assert evaluation is not None
        world = evaluation.world
        copy = frozen_copy(encoder, 0, evaluation)
        train = extract(evaluation, copy, "train", keep=False).to(world.device)
        rankme = effective_rank(train, world)
        if not self._has_classes:
            return {"rankme": rankme}
        val = extract(evaluation, copy, "val", keep=False).to(world.device)
        k, num_classes = min(TRAINING_K, train.total), len(evaluation.train.classes)
        by_k = knn_accuracy(
            train.values, train.labels, val.values, val.labels, [k], TRAINING_TEMPERATURE, num_classes, world
        )
        standardise(train, val, world)
        return {"knn_top1": by_k[k], "probe_top1": ridge_accuracy(train, val, num_classes, world), "rankme": rankme}


def _evaluation(config: PretrainConfig, images: ImageFolder, world: World) -> Evaluation:
    """What a `Probe` evaluates on: labelled images, or where there are no labels some of the run's own."""
    data = EvalDataConfig(**{name: getattr(config.data, name) for name in ("loader", *LoadingConfig.model_fields)})
    num_train = min(config.log.knn_train_samples, config.data.max_samples or config.log.knn_train_samples)
    if images.classes:
        train, val = labelled_images(config.data.root, num_train, config.log.knn_val_samples, config.run.dir, world)
        remember(config.data.root, RunFolder(config.run.dir).data_roots, world)
    else:
        train = val = subset(images, num_train)
    crop = config.data.image_size
    dtype = compute_dtype(config.optim.precision, world.device)
    evaluation = EvalConfig(run_dir=config.run.dir, data=data)
    return Evaluation(evaluation, config, train, val, round(crop * 8 / 7), crop, dtype, world)


@torch.no_grad()
def ridge_accuracy(train: Features, val: Features, num_classes: int, world: World) -> float:
    """Top-1 in percent of the linear map from features to class indicators that least squares gives.

    W = (X'X + λI)⁻¹ X'Y, with λ = RIDGE times the mean eigenvalue of X'X; what is added to all scores is each class's
    share, since X has mean 0. In float64, and so the same on any number of ranks up to rounding. Receives 2 (D² + DC)
    numbers.

    Args:
        train: this rank's share of the standardised features (`standardise`).
        val: this rank's share, standardised likewise.
        num_classes: C; labels are below it.
        world: this process.
    """
    dim = train.values.shape[1]
    sums = train.values.new_zeros(dim + 1, dim + num_classes, dtype=torch.float64)  # X'X and X'Y; below, Y's
    for values, labels in zip(train.values.split(CHUNK), train.labels.split(CHUNK), strict=True):
        x, y = values.double(), F.one_hot(labels, num_classes).double()
        sums[:dim] += x.T @ torch.cat([x, y], dim=1)
        sums[dim, dim:] += y.sum(0)
    sums = all_reduce_sum(sums, world)
    gram, targets, shares = sums[:dim, :dim], sums[:dim, dim:], sums[dim, dim:] / train.total
    gram.diagonal().add_((RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny))  # if collapsed: 0
    weights = torch.linalg.solve(gram, targets)
    hits = train.values.new_zeros((), dtype=torch.int64)
    for values, labels in zip(val.values.split(CHUNK), val.labels.split(CHUNK), strict=True):
        hits += ((values.double() @ weights + shares).argmax(1) == labels).sum()
    return 100 * all_reduce_sum(hits, world).item() / val.total


@torch.no_grad()
def effective_rank(features: Features, world: World) -> float:
    """RankMe (arXiv 2210.02885, eq. 1 and 2): how many dimensions the features fill; it needs no labels.

    exp(−Σ p log p), with p the singular values of the N x D features over their sum, plus EPSILON: 1 where all features
    point one way, min(N, D) where they fill all directions alike. The singular values are the roots of the eigenvalues
    of X'X, in float64. Receives 2 D² numbers.

    Args:
        features: this rank's share, as the encoder gives them.
        world: this process.
    """
    dim = features.values.shape[1]
    gram = features.values.new_zeros(dim, dim, dtype=torch.float64)
    for values in features.values.split(CHUNK):
        gram += values.double().T @ values.double()
    eigenvalues = torch.linalg.eigvalsh(all_reduce_sum(gram, world))[-min(features.total, dim) :]
    singular = eigenvalues.clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=torch.finfo(gram.dtype).tiny) + EPSILON
    return torch.exp(-(p * p.log()).sum()).item()
