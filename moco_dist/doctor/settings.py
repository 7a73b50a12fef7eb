"""Settings that are allowed, and are known not to work well: the questions that users of MoCo ask."""

from moco_dist.config.architectures import blocks_in
from moco_dist.config.evaluate import FinetuneConfig, LinearConfig
from moco_dist.config.pretrain import PretrainConfig, block_sizes, size_problems
from moco_dist.data.traffic import key_traffic
from moco_dist.doctor.finding import Finding, fine, problem, warning

SMALL_IMAGE_PIXELS = 64
LARGE_BATCH = 1024
LINEAR_LR = 1.0  # pre-training rates are below it, those of linear evaluation above


def pretraining(
    config: PretrainConfig, world_size: int, local_world_size: int, num_images: int | None
) -> list[Finding]:
    """Findings about a pre-training on `world_size` ranks.

    Args:
        config: of the run.
        world_size: ranks.
        local_world_size: ranks on a host.
        num_images: in the data set; None: not known.
    """
    found = [problem("sizes", line) for line in size_problems(config, world_size)]
    batch = config.optim.global_batch_size
    if num_images is not None and num_images < batch:
        return [*found, problem("sizes", f"{num_images} images are less than one batch: --optim.global-batch-size, now "
                                f"{batch}, and --moco.queue-size have to be smaller")]  # fmt: skip
    if not found:
        found += _shuffle(config, world_size, local_world_size)
    found += _batch_norm(config) + _optimiser(config)
    if config.of_method.queue_keys:
        found += _queue(config, num_images)
    if num_images is not None:
        steps = num_images // batch * config.optim.epochs
        found += [warning("too short", line) for line in config.of_method.too_short(batch, steps)]
    model, data = config.model, config.data
    if data.image_size <= SMALL_IMAGE_PIXELS and model.stem == "imagenet" and (blocks_in(model.arch) or 0) > 4:
        found.append(warning("stem", f"images of {data.image_size} px shrink to 1/4 before the first block; "
                             "--model.stem cifar keeps them"))  # fmt: skip
    return found or [fine("settings", f"sizes fit {world_size} rank(s), and nothing is unusual")]


def _batch_norm(config: PretrainConfig) -> list[Finding]:
    group, batch = config.model.bn_group_size, config.optim.global_batch_size
    if config.shuffle.block_size == 1:
        return [fine("BN groups", f"{config.model.arch} has no BatchNorm, so keys are not shuffled")]
    if group == batch:
        smaller = next((size for size in (32, 16, 8) if size < batch and batch % size == 0), batch // 2)
        return [warning("BN groups", f"one group holds the whole batch ({batch}), so a query and its key share "
                        "BatchNorm statistics and the loss can be cheated; groups work on a single GPU too: "
                        f"--model.bn-group-size {smaller}")]  # fmt: skip
    if group < 8:
        return [warning("BN groups", f"statistics over {group} samples are noisy; the paper's 32 is usual")]
    return []


def _shuffle(config: PretrainConfig, world_size: int, local_world_size: int) -> list[Finding]:
    """Blocks of keys that lie on several hosts: images are decoded twice, or sent from host to host."""
    batch = config.optim.global_batch_size
    keys = key_traffic(config, batch // world_size, world_size, local_world_size)
    if not keys.spans_hosts:
        return []
    of_host = batch // world_size * local_world_size
    fitting = [size for size in block_sizes(batch, config.model.bn_group_size) if of_host % size == 0]
    how = f"--shuffle.block-size {fitting[-1]} fits a host" if fitting else "a larger batch a host would hold one"
    return [warning("shuffle", f"{keys.text()}; a host has {of_host} samples of a step: {how}")]


def _queue(config: PretrainConfig, num_images: int | None) -> list[Finding]:
    found = []
    queue, optim, moco = config.moco.queue_size, config.optim, config.moco
    if num_images is not None and queue > num_images:
        found.append(warning("queue", f"moco.queue_size {queue} is larger than the data set ({num_images}): "
                             "older keys of the very same image are among its negatives; "
                             f"--moco.queue-size {max(optim.global_batch_size, num_images // 4)} or less"))  # fmt: skip
    if num_images is not None and (
        moco.num_filling_batches(optim.global_batch_size) > num_images // optim.global_batch_size
    ):
        found.append(problem("queue", f"moco.queue_start keys fills {queue} keys from one epoch, which has fewer: "
                             "random, or a smaller --moco.queue-size"))  # fmt: skip
    if queue < 4 * optim.global_batch_size:
        found.append(warning("queue", f"moco.queue_size {queue} is only {queue / optim.global_batch_size:.1f} batches: "
                             "MoCo lives from many negatives (the paper: 256 batches)"))  # fmt: skip
    if config.model.head_hidden_dims and moco.temperature < 0.1:
        found.append(warning("temperature", f"{moco.temperature} is v1's; with an MLP head 0.2 gave 66.2 % and "
                             "0.07 62.9 % (arXiv 2003.04297, Table 2)"))  # fmt: skip
    return found


def _optimiser(config: PretrainConfig) -> list[Finding]:
    optim, found = config.optim, []
    if optim.base_lr >= LINEAR_LR:
        found.append(warning("learning rate", f"optim.base_lr {optim.base_lr:g} is one of linear evaluation (30); "
                             "pre-training takes 0.03 at batch 256"))  # fmt: skip
    if optim.global_batch_size >= LARGE_BATCH and optim.optimizer == "sgd" and not optim.warmup_epochs:
        found.append(warning("learning rate", f"batch {optim.global_batch_size} with SGD and no warm-up is often "
                             "unstable: --optim.warmup-epochs 10, or --optim.optimizer lars"))  # fmt: skip
    return found + _milestones(optim.milestones if optim.schedule == "step" else (), optim.epochs)


def linear(config: LinearConfig) -> list[Finding]:
    """Findings about a linear evaluation."""
    found = _milestones(config.milestones, config.epochs)
    if config.lr < LINEAR_LR:
        found.append(warning("learning rate", f"lr {config.lr:g} is far below 30, which MoCo's frozen features want "
                             "(arXiv 1911.05722, sec. 4.1): accuracy will be low"))  # fmt: skip
    else:
        found.append(fine("learning rate", f"lr {config.lr:g} looks large and is right: MoCo's features are small, "
                             "and the published rate is 30"))  # fmt: skip
    if config.weight_decay:
        found.append(warning("weight decay", f"{config.weight_decay:g}; the published recipe has 0"))
    return found


def finetune(config: FinetuneConfig) -> list[Finding]:
    """Findings about a fine-tuning."""
    if config.classifier_lr < config.backbone_lr:
        return [warning("learning rate", f"classifier_lr {config.classifier_lr:g} is below backbone_lr "
                        f"{config.backbone_lr:g}: the new layer is usually trained at 10 to 100 times the "
                        "backbone's rate"), *_milestones(config.milestones, config.epochs)]  # fmt: skip
    rates = fine("learning rate", f"backbone {config.backbone_lr:g}, classifier {config.classifier_lr:g}")
    return [rates, *_milestones(config.milestones, config.epochs)]


def _milestones(milestones: tuple[int, ...], epochs: int) -> list[Finding]:
    late = [epoch for epoch in milestones if epoch >= epochs]
    if not late:
        return []
    return [warning("milestones", f"{late} lie past the end ({epochs} epochs), so the rate never drops there; "
                    f"0.6 and 0.8 of the schedule are {epochs * 6 // 10} and {epochs * 8 // 10}")]  # fmt: skip
