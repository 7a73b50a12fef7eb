"""What a run says of itself at its start."""

import torch

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.plan import Plan
from moco_dist.data.traffic import key_traffic
from moco_dist.distributed.world import World
from moco_dist.engine.precision import slow_on_cpu
from moco_dist.engine.schedule import learning_rate_formula
from moco_dist.method.step import Method


def opening_lines(config: PretrainConfig, plan: Plan, method: Method, stop: int, world: World) -> list[str]:
    """What is trained on what, how, and how keys are shuffled; and what to be warned of."""
    model, optim = config.model, config.optim
    going_on = f"goes on at step {method.step}" if method.step else "starts"
    if method.step >= stop:
        going_on = f"nothing is left to train at step {method.step}"
    lines = [
        f"{model.arch} on {plan.num_samples} images of {config.data.root}, {plan.steps_per_epoch} steps x "
        f"{optim.epochs} epochs of {optim.global_batch_size} samples on {world.world_size} rank(s) of "
        f"{torch.device(world.device).type}, {method.dtype}",
        f"{going_on}: {learning_rate_formula(optim)}, {config.of_method.described()}, BN over {model.bn_group_size}; "
        f"run folder {config.run.dir}",
        key_traffic(
            config, optim.global_batch_size // world.world_size, world.world_size, world.local_world_size
        ).text(),
    ]
    lines += [note for note in getattr(method.query_encoder, "notes", [])]
    if method.queue is not None and method.queue.size > plan.num_samples:
        lines.append(
            f"warning: moco.queue_size {method.queue.size} is larger than the data set ({plan.num_samples}): "
            "older keys of the very same image are among its negatives, and the loss pushes them away"
        )
    if slow := slow_on_cpu(method.dtype, world.device):
        lines.append(slow)
    return lines
