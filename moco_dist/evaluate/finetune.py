"""Fine-tuning: the pre-trained backbone and a new linear layer, all trained with labels, or with a share of them.

It is the usual measure beside linear evaluation, and with `data.label_fraction` 0.01 or 0.1 semi-supervised. The
new layer has a rate of its own. BatchNorm normalises over groups of the pre-training's size, so that 1 and 8 ranks
compute the same; its running statistics, the mean over all ranks', serve validation.

A step is a function of (seed, epoch, batch). Validation images are counted once.
"""

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist.config.evaluate import FinetuneConfig
from moco_dist.config.pretrain import EngineConfig
from moco_dist.data.batch import to_device
from moco_dist.distributed.stop import StopRequest
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.engine.ddp import DDPEngine
from moco_dist.engine.optimizer import make_buffers
from moco_dist.engine.schedule import step_decay
from moco_dist.engine.speed import set_backends
from moco_dist.errors import UserError, not_a_multiple
from moco_dist.evaluate.batches import batches_in_epoch, crop_batches, global_batches
from moco_dist.evaluate.classifiers import CURVE_POINTS, initial_classifier, per_class_accuracy, top_accuracies
from moco_dist.evaluate.features import Features, extract
from moco_dist.evaluate.progress import SAVE_SECONDS, Curve, Training, progress_path
from moco_dist.evaluate.subject import Evaluation, FrozenEncoder, frozen_encoder, open_evaluation, write_trained
from moco_dist.method.batch_norm import running_statistics
from moco_dist.run import checkpoint


class Network(nn.Module):
    """Normalised images to logits."""

    def __init__(self, encoder: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, classifier

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, C), never below float32 whatever the autocast."""
        logits = self.classifier(self.encoder(images))
        return logits if logits.dtype == torch.float64 else logits.float()


def run_finetune(config: FinetuneConfig, world: World) -> list[dict[str, Any]]:
    """`moco-dist finetune`: the accuracy from each of `config.encoders`, into RUN/eval/finetune_ENCODER.json.

    Called by all ranks. The network itself is not kept.

    Returns:
        what was written, as `run_linear` does.

    Raises:
        UserError: there is no run, no checkpoint or no labelled images, or a batch is not whole BN groups on each rank.
        Preempted: somebody asked for an end; what was done is kept.
    """
    evaluation = open_evaluation(config, world)
    batch_size = batch_of_groups(evaluation, config)
    results = []
    for name in config.encoders:
        started = time.perf_counter()
        encoder = frozen_encoder(evaluation, name)
        progress = progress_path(evaluation, "finetune", encoder, batch_size)
        with StopRequest(SAVE_SECONDS, world) as stop:
            accuracy, curve, per_class = finetune(evaluation, config, encoder, batch_size, progress, stop)
        seconds = time.perf_counter() - started
        results.append(write_trained(evaluation, "finetune", encoder, accuracy, seconds, curve, per_class, progress))
    return results


def batch_of_groups(evaluation: Evaluation, config: FinetuneConfig) -> int:
    """The global batch size: the config's, or with fewer images the most whole BN groups a rank that there are.

    Raises:
        UserError: the config's does not divide, with the two nearest that do; or there are too few images.
    """
    group, ranks = evaluation.pretrain.model.bn_group_size, evaluation.world.world_size
    unit, batch, images = group * ranks, config.global_batch_size, len(evaluation.train.paths)
    if batch % unit:
        what = f"{unit} = {ranks} rank(s) x BN groups of {group}"
        raise UserError(not_a_multiple("global_batch_size", batch, unit, what))
    if images < unit:
        raise UserError(f"{images} training images are less than a BN group of {group} on each of {ranks} rank(s)")
    return min(batch, images // unit * unit)


def finetune(
    evaluation: Evaluation,
    config: FinetuneConfig,
    encoder: FrozenEncoder,
    batch_size: int,
    progress: Path | None = None,
    stop: StopRequest | None = None,
) -> tuple[dict[str, float], Curve, list[float]]:
    """Train the encoder's module in place, from the last step that an interrupted training has saved.

    Args:
        evaluation: settings and images.
        config: the recipe.
        encoder: what the training starts from.
        batch_size: over all ranks, whole BN groups on each.
        progress: a file to keep the training in, and to go on from.
        stop: who may ask for an end; None: nobody.

    Returns:
        finetune_top1 and finetune_top5 in percent; a dict an epoch, with its mean loss and after some the top-1; and
        the top-1 of each class.

    Raises:
        UserError: the loss is not finite any more.
        Preempted: somebody asked for an end.
    """
    world, num_classes = evaluation.world, len(evaluation.train.classes)
    network = Network(encoder.module, initial_classifier(encoder.dim, num_classes, config.seed))
    network = network.to(world.device, next(encoder.module.parameters()).dtype).requires_grad_(True)
    set_backends(evaluation.pretrain.engine)
    sgd = _optimizer(network, config)
    engine = DDPEngine(network, sgd, encoder.dtype, EngineConfig(), world)
    training = Training(progress, network, sgd, stop, world, lambda: _average_statistics(network, world))
    curve, per_epoch = training.curve, batches_in_epoch(len(evaluation.train.labels), batch_size)
    with Told(f"fine-tuning, {encoder.name}", config.epochs * per_epoch, "steps", world, training.step) as told:
        for epoch in range(config.epochs):
            if epoch == len(curve):
                _epoch(engine, evaluation, config, encoder, batch_size, training, told, epoch)
                mean_loss = training.mean_loss()
                if not math.isfinite(mean_loss):
                    raise UserError(
                        f"the loss is {mean_loss} in epoch {epoch + 1}; a backbone_lr below {config.backbone_lr:g} or "
                        f"a classifier_lr below {config.classifier_lr:g} may be stable"
                    )
                curve.append({"epoch": epoch + 1, "loss": mean_loss})
                _average_statistics(network, world)
            is_due = (epoch + 1) % max(1, config.epochs // CURVE_POINTS) == 0 and epoch + 1 < config.epochs
            if is_due and "top1" not in curve[epoch]:
                training.save()
                val = _validation_features(evaluation, encoder, network, stop)
                curve[epoch]["top1"] = top_accuracies(network.classifier, val, world, "finetune")["finetune_top1"]
    training.save()
    val = _validation_features(evaluation, encoder, network, stop)
    accuracy = top_accuracies(network.classifier, val, world, "finetune")
    curve[-1]["top1"] = accuracy["finetune_top1"]
    return accuracy, curve, per_class_accuracy(network.classifier, val, num_classes, world)


def _optimizer(network: Network, config: FinetuneConfig) -> torch.optim.SGD:
    """SGD at the backbone's rate; the classifier's is a multiple of it."""
    groups = [
        {"params": list(network.encoder.parameters())},
        {"params": list(network.classifier.parameters()), "lr_scale": config.classifier_lr / config.backbone_lr},
    ]
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum, weight_decay=config.weight_decay, fused=True)
    make_buffers(sgd)
    return sgd


def _epoch(
    engine: DDPEngine,
    evaluation: Evaluation,
    config: FinetuneConfig,
    encoder: FrozenEncoder,
    batch_size: int,
    training: Training,
    told: Told,
    epoch: int,
) -> None:
    """Train for one epoch, or for what is left of it."""
    world, labels = evaluation.world, torch.tensor(evaluation.train.labels).to(evaluation.world.device)
    batches = global_batches(len(labels), batch_size, config.seed, epoch)
    batches = batches[training.step - epoch * len(batches) :]
    if not batches:
        return
    # Neighbours in a batch share a BN group, on whichever rank.
    own = [batch.reshape(world.world_size, -1)[world.rank] for batch in batches]
    lr = config.backbone_lr * step_decay(config.milestones, epoch, config.lr_decay)
    engine.module.train()
    with contextlib.closing(crop_batches(evaluation, own, config.crop_scale, config.seed, epoch)) as views_of_batches:
        for views, rows in zip(views_of_batches, own, strict=True):
            logits = engine(encoder.normalised(views))
            loss = F.cross_entropy(logits, labels[to_device(rows, labels.device)])
            engine.backward(loss)
            engine.step(lr)
            training.add(loss)
            told.add(note=f"epoch {epoch + 1}")


def _average_statistics(network: Network, world: World) -> None:
    """Make running statistics the mean over ranks; what follows is the same as if they were averaged later."""
    averaged = checkpoint.averaged(network, world)
    for name, buffer in running_statistics(network).items():
        buffer.copy_(averaged[name])


def _validation_features(
    evaluation: Evaluation, encoder: FrozenEncoder, network: Network, stop: StopRequest | None
) -> Features:
    """This rank's share, by the module as it is now, for the network's classifier."""
    network.eval()
    val = extract(evaluation, encoder, "val", keep=False, stop=stop).to(evaluation.world.device)
    return dataclasses.replace(val, values=val.values.to(network.classifier.weight.dtype))
