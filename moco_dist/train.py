"""Pre-training by MoCo v2: builds everything, then the loop. Algorithm 1 of v1 (arXiv 1911.05722), line by line."""

import contextlib
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.batch import CropBatch, to_device
from moco_dist.data.colours import apply_colours
from moco_dist.data.images import ImageFolder, subset
from moco_dist.data.key_views import key_views
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.distributed.agreement import require_agreement
from moco_dist.distributed.collectives import all_gather
from moco_dist.distributed.stop import STOP, StopRequest
from moco_dist.distributed.world import World
from moco_dist.engine import Engine
from moco_dist.engine.ddp import DDPEngine
from moco_dist.engine.optimizer import build_optimizer
from moco_dist.engine.precision import autocast, compute_dtype
from moco_dist.engine.schedule import learning_rate, learning_rate_formula
from moco_dist.engine.speed import compile_options, compiled_on_gpu, keep_freed_memory, set_backends
from moco_dist.errors import LoadingError, Preempted, UserError
from moco_dist.evaluate.during_training import accuracies_during_training, training_evaluation
from moco_dist.method.batch_norm import set_micro_batch
from moco_dist.method.encoder import build_encoder
from moco_dist.method.infonce import contrastive_accuracy, exchange, info_nce, unshuffle
from moco_dist.method.momentum import key_encoder_of, momentum_update
from moco_dist.method.ntxent import batch_accuracy, nt_xent
from moco_dist.method.queue import Queue
from moco_dist.provenance import git_state, package_versions
from moco_dist.run import checkpoint
from moco_dist.run.checkpoint import TrainState
from moco_dist.run.folder import RunFolder
from moco_dist.run.image_list import listed
from moco_dist.run.logbook import Logbook
from moco_dist.run.resume import facts_to_agree_on, resume, without_secrets
from moco_dist.run.saver import Saver
from moco_dist.tracking import Tracker


class StepResult(NamedTuple):
    """What a step leaves for the log: this rank's mean loss (), and at log steps the monitored scalars ()."""

    loss: Tensor
    scalars: dict[str, Tensor]


def pretrain(config: PretrainConfig, world: World, tracker: Tracker) -> Path:
    """Train to the end of the schedule (or run.stop_at_step), from the newest checkpoint of the run's folder if any.

    Returns:
        the folder of the last checkpoint.

    Raises:
        UserError: the data cannot be read, or the folder holds another run.
    """
    stop_request = StopRequest(config.checkpoint.every_seconds, world)
    folder = subset(find_images(config.data.root, "train"), config.data.max_samples)
    plan = Plan(len(folder.paths), config.optim.global_batch_size, config.run.seed)
    require_agreement(facts_to_agree_on(config, folder), world)
    if config.log.knn_every_epochs:
        training_evaluation(config, world)  # a validation set that is missing is told now, not after an epoch
    state, engine = build(config, world)
    run_dir = config.run.dir
    notes, pending_losses = resume(state, config, folder, world)
    total_steps = config.optim.epochs * plan.steps_per_epoch
    stop = min(total_steps, config.run.stop_at_step or total_steps)
    logbook = Logbook(run_dir, tracker, world, state.step, stop, pending_losses)
    say_start(logbook, config, folder, plan, state, stop, world, notes)
    keep_every_steps = config.checkpoint.keep_every_epochs * plan.steps_per_epoch
    saver = Saver(run_dir, config.checkpoint.keep_last, keep_every_steps, world, logbook.say)
    kept = without_secrets(config).model_dump(mode="json")
    facts = {"config": kept, "versions": package_versions(), "git": git_state(), "images": listed(folder)}
    dtype = compute_dtype(config.optim.precision, world.device)
    colour = compiled_on_gpu(apply_colours, config.engine, world.device)
    feed = batches(config, folder, plan, world, state.step, stop, stop_request.ends_waiting)

    try:
        for step, batch, wait_seconds in feed:
            view_q = colour(batch.view_q, batch.colours_q, config.augment, dtype)
            view_k = key_views(batch, config, plan, step, world, dtype, colour)
            key_order = to_device(plan.key_permutation(step), world.device)
            lr = learning_rate(config.optim, step, plan.steps_per_epoch)
            is_log_step = is_due(step + 1, config.log.every_steps) or step + 1 == stop
            result = train_step(state, engine, config, view_q, view_k, key_order, lr, is_log_step, world)
            logbook.add(result.loss, wait_seconds)
            for file in batch.replaced:
                logbook.say_of_rank(f"replaced by its successor: {file}")

            asked = stop_request.agreed(state.step)
            is_save_step = is_due(state.step, config.checkpoint.every_steps) or state.step == stop or asked is not None
            if is_log_step or is_save_step:
                require_finite(logbook, config, plan)
            if is_log_step:
                logbook.write(
                    state.step, state.step / plan.steps_per_epoch, lr, config.optim.global_batch_size, result.scalars
                )
            if is_due(state.step, config.log.knn_every_epochs * plan.steps_per_epoch) or (
                config.log.knn_every_epochs and state.step == stop
            ):
                started = time.perf_counter()
                accuracies = accuracies_during_training(state.query_encoder, config, world)
                logbook.record({"step": state.step, **accuracies})
                logbook.exclude(time.perf_counter() - started)
            if is_save_step:
                saver.save(state, {**facts, "pending_losses": logbook.pending_losses()})
                logbook.exclude(saver.stall_seconds)
            if asked == STOP and state.step != stop:
                saver.finish()
                if world.is_main:
                    RunFolder(run_dir).stopped.write_text(json.dumps({"step": state.step}))
                raise Preempted(state.step)
        saver.finish()
        checkpoint.export_backbone(state, RunFolder(run_dir).backbone, world)
        return checkpoint.latest(run_dir)
    except LoadingError:
        if world.world_size > 1:
            raise  # the others are in the midst of a step, which needs this rank's batch
        saver.save(state, {**facts, "pending_losses": logbook.pending_losses()})
        saver.finish()
        if stop_request.ends_waiting():
            RunFolder(run_dir).stopped.write_text(json.dumps({"step": state.step}))
            raise Preempted(state.step) from None
        raise
    finally:
        feed.close()
        logbook.close()


def train_step(
    state: TrainState, engine: Engine, config: PretrainConfig, view_q: Tensor, view_k: Tensor, key_order: Tensor,
    lr: float, is_log_step: bool, world: World,
) -> StepResult:
    """One optimiser step of MoCo (v1 Algorithm 1), the same at any world size and number of micro-batches.

    Args:
        state: the run; its weights, key weights, queue and step change.
        engine: forward, backward and step of the query encoder.
        config: momentum, temperature, micro-batches.
        view_q: (B/W, 3, S, S) this rank's queries' views.
        view_k: (B/W, 3, S, S) the key views this rank encodes: of other samples (shuffled BN).
        key_order: int64 (B,), `Plan.key_permutation` of this step, on the views' device.
        lr: learning rate.
        is_log_step: whether to look at the embeddings.
        world: this process.
    """
    if config.engine.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs returned may be overwritten
    if config.method == "simclr":
        return _simclr(state, engine, config, view_q, view_k, key_order, lr, is_log_step, world)
    if config.moco.symmetric:
        return _symmetric(state, engine, config, view_q, view_k, key_order, lr, is_log_step, world)
    temperature, accum = config.moco.temperature, config.optim.grad_accum_steps
    momentum_update(state.query_encoder, state.key_encoder, config.moco.momentum)  # before the keys are made
    keys = encode_keys(state, config, view_k, world)
    own_rows = slice(world.rank * len(keys), (world.rank + 1) * len(keys))
    loss_sum = view_q.new_zeros((), dtype=keys.dtype)
    for i, views in enumerate(view_q.chunk(accum)):
        set_micro_batch(state.query_encoder, i, accum)
        q = engine(views, synchronise=i == accum - 1)
        if i == 0:
            q_all, k_all = exchange(q, keys, key_order, world)
        else:
            q_all = all_gather(q.detach(), world)
        k = k_all[own_rows].chunk(accum)[i]
        loss = info_nce(q, k, q_all, state.queue.keys, temperature, world)
        engine.backward(loss / accum)
        loss_sum += loss.detach()
    engine.step(lr)
    scalars = monitor(q_all, k_all, accum, state.queue, world) if is_log_step else {}
    state.queue.enqueue(k_all)  # after the loss: a key is never its own negative
    state.step += 1
    return StepResult(loss_sum / accum, scalars)


def _symmetric(
    state: TrainState, engine: Engine, config: PretrainConfig, view_q: Tensor, view_k: Tensor, key_order: Tensor,
    lr: float, is_log_step: bool, world: World,
) -> StepResult:
    """`train_step` with each view as query and as key (as in arXiv 2104.02057, Algorithm 1, but with the queue).

    The second direction needs no further image: its queries are the key views that this rank has, of the shuffled
    batch, and its keys the query views, in sample order. So here too no query shares its BN group with its own key.
    """
    temperature, accum = config.moco.temperature, config.optim.grad_accum_steps
    momentum_update(state.query_encoder, state.key_encoder, config.moco.momentum)
    keys = torch.cat([encode_keys(state, config, view_k, world), encode_keys(state, config, view_q, world)])
    gathered = all_gather(keys[None], world).unflatten(1, (2, -1))  # (W, 2, B/W, C)
    k_all = unshuffle(gathered[:, 0].flatten(0, 1), key_order)
    k_all_back = gathered[:, 1].flatten(0, 1)
    own_rows = slice(world.rank * len(view_q), (world.rank + 1) * len(view_q))
    views = [torch.cat(pair) for pair in zip(view_q.chunk(accum), view_k.chunk(accum), strict=True)]
    own, back = k_all[own_rows].chunk(accum), k_all_back[key_order[own_rows]].chunk(accum)
    loss_sum = view_q.new_zeros((), dtype=keys.dtype)
    for i in range(accum):
        set_micro_batch(state.query_encoder, i, accum)
        q, k = engine(views[i], synchronise=i == accum - 1), torch.cat([own[i], back[i]])
        q_all = all_gather(q.detach(), world)
        loss = info_nce(q, k, q_all, state.queue.keys, temperature, world)
        engine.backward(loss / accum)
        loss_sum += loss.detach()
    engine.step(lr)
    scalars = {}
    if is_log_step:
        top1, top5 = contrastive_accuracy(q_all, all_gather(k, world), state.queue.keys, world)
        scalars = {"contrastive_top1": top1, "contrastive_top5": top5, "embedding_std": spread(q_all)}
    state.queue.enqueue(torch.cat([k_all, k_all_back]))
    state.step += 1
    return StepResult(loss_sum / accum, scalars)


def _simclr(
    state: TrainState, engine: Engine, config: PretrainConfig, view_q: Tensor, view_k: Tensor, key_order: Tensor,
    lr: float, is_log_step: bool, world: World,
) -> StepResult:
    """`train_step` of SimCLR (arXiv 2002.05709, Algorithm 1), for comparison: end to end, the batch its own dictionary.

    The second views come shuffled over the BN groups, as MoCo's keys do, so that an encoder cannot tell a pair by the
    statistics that it shares (SimCLR itself normalises over all devices, sec. 2.2, and names the shuffle as another).
    """
    z_q, z_k = engine(torch.cat([view_q, view_k])).chunk(2)
    loss = nt_xent(z_q, z_k, key_order, config.simclr.temperature, world)
    engine.backward(loss)
    engine.step(lr)
    scalars = {}
    if is_log_step:
        top1, top5, first = batch_accuracy(z_q.detach(), z_k.detach(), key_order, world)
        scalars = {"contrastive_top1": top1, "contrastive_top5": top5, "embedding_std": spread(first)}
    state.step += 1
    return StepResult(loss.detach(), scalars)


@torch.no_grad()
def encode_keys(state: TrainState, config: PretrainConfig, view_k: Tensor, world: World) -> Tensor:
    """(B/W, C) keys of the shuffled batch, all micro-batches of the step, before the first loss."""
    accum = config.optim.grad_accum_steps
    keys = []
    for i, views in enumerate(view_k.chunk(accum)):
        set_micro_batch(state.key_encoder, i, accum)
        with autocast(compute_dtype(config.optim.precision, world.device), world.device):
            keys.append(state.key_encoder(views))
    return torch.cat(keys)


def monitor(q_all: Tensor, k_all: Tensor, accum: int, queue: Queue, world: World) -> dict[str, Tensor]:
    """Of the last micro-batch: contrastive accuracy in percent, and the embeddings' spread over the sphere."""
    positives = k_all.view(world.world_size, accum, -1, k_all.shape[1])[:, -1].flatten(0, 1)  # in q_all's order
    top1, top5 = contrastive_accuracy(q_all, positives, queue.keys, world)
    return {"contrastive_top1": top1, "contrastive_top5": top5, "embedding_std": spread(q_all)}


def spread(embeddings: Tensor) -> Tensor:
    """Standard deviation of (N, C) unit vectors times sqrt(C): 1 when they fill the sphere, 0 when they collapsed."""
    return embeddings.std(dim=0).mean() * embeddings.shape[1] ** 0.5


def build(config: PretrainConfig, world: World) -> tuple[TrainState, Engine]:
    """The run at step 0: encoders with equal weights, the queue filled, the engine around the query encoder."""
    dtype = compute_dtype(config.optim.precision, world.device)
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    set_backends(config.engine)
    keep_freed_memory(world.device)
    query_encoder = build_encoder(config.model, config.run.seed).to(world.device, weights_dtype)
    is_moco = config.method == "moco"
    key_encoder = key_encoder_of(query_encoder) if is_moco else query_encoder  # SimCLR's only one
    queue_size = config.moco.queue_size if is_moco else 0
    queue = Queue(queue_size, config.model.embedding_dim, config.run.seed, world, weights_dtype)
    optimizer = build_optimizer(query_encoder, config.optim)
    if config.engine.kind == "deepspeed":
        from moco_dist.engine.deepspeed import DeepSpeedEngine

        engine: Engine = DeepSpeedEngine(query_encoder, optimizer, dtype, config.engine, world)
        if config.engine.zero_stage:
            key_encoder.to(memory_format=torch.contiguous_format)  # as the query encoder, for one momentum update
    else:
        engine = DDPEngine(query_encoder, optimizer, dtype, config.engine, world)
    if config.engine.compile != "off" and is_moco:
        key_encoder.compile(**compile_options(config.engine))
    return TrainState(query_encoder, key_encoder, engine, queue, step=0), engine


def batches(
    config: PretrainConfig, folder: ImageFolder, plan: Plan, world: World, start: int, stop: int,
    ends_waiting: Callable[[], bool],
) -> Generator[tuple[int, CropBatch, float], None, None]:
    """(step, this rank's batch on the device, seconds waited for it) of steps start .. stop-1."""
    with contextlib.closing(pretrain_batches(folder, config, plan, world, start, stop, ends_waiting)) as loader:
        for step in range(start, stop):
            waiting_since = time.perf_counter()
            batch = next(loader).to(torch.device(world.device))
            yield step, batch, time.perf_counter() - waiting_since


def require_finite(logbook: Logbook, config: PretrainConfig, plan: Plan) -> None:
    """Stop if a loss since the last log step is not a number. Called by all ranks.

    The engine has left out the steps with such a loss, so nothing was saved, or will be, that one has touched.

    Raises:
        UserError: on all ranks, with the step, the loss, the learning rate and the last checkpoint.
    """
    found = logbook.first_not_finite()
    if found is None:
        return
    step, loss = found
    saved = checkpoint.complete_checkpoints(config.run.dir)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    lr = learning_rate(config.optim, step, plan.steps_per_epoch)
    raise UserError(f"the loss is {loss} at step {step} (learning rate {lr:.4g}); {last}; a lower optim.base_lr or a "
                    "warm-up (optim.warmup_epochs) may be stable")  # fmt: skip


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step` of them."""
    return every > 0 and step % every == 0


def say_start(
    logbook: Logbook, config: PretrainConfig, folder: ImageFolder, plan: Plan, state: TrainState, stop: int,
    world: World, notes: list[str],
) -> None:
    """Two lines: what is trained on what, and how; and what to be warned of."""
    for note in notes:
        logbook.say(note)
    model, optim = config.model, config.optim
    logbook.say(
        f"{model.arch} on {len(folder.paths)} images of {config.data.root}, {plan.steps_per_epoch} steps x "
        f"{optim.epochs} epochs of {optim.global_batch_size} samples on {world.world_size} rank(s) of "
        f"{torch.device(world.device).type}, {compute_dtype(optim.precision, world.device)}"
    )
    going_on = f"goes on at step {state.step}" if state.step else "starts"
    if state.step >= stop:
        going_on = f"nothing is left to train at step {state.step}"
    moco = config.moco
    method = f"SimCLR, tau {config.simclr.temperature}"
    if config.method == "moco":
        method = f"K {moco.queue_size}, m {moco.momentum}, tau {moco.temperature}"
    logbook.say(
        f"{going_on}: {learning_rate_formula(optim)}, {method}, BN over {model.bn_group_size}; "
        f"run folder {config.run.dir}"
    )

    if config.method == "moco" and moco.queue_size > len(folder.paths):
        logbook.say(
            f"warning: moco.queue_size {moco.queue_size} is larger than the data set ({len(folder.paths)}): "
            "older keys of the very same image are among its negatives, and the loss pushes them away"
        )
