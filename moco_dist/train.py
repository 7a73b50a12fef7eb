"""Pre-training: builds everything, then the loop. What a step does is in `method/moco.py`."""

import contextlib
import functools
import json
from collections.abc import Generator
from pathlib import Path

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.colours import apply_colours
from moco_dist.data.plan import Plan, filling_steps, plan_of
from moco_dist.data.views import Views, views_of_steps
from moco_dist.distributed.agreement import require_agreement
from moco_dist.distributed.stop import FAILED, STOP, StopRequest
from moco_dist.distributed.world import World
from moco_dist.engine.schedule import learning_rate
from moco_dist.engine.speed import compiled_on_gpu
from moco_dist.errors import LoadingError, Preempted, UserError
from moco_dist.evaluate.during_training import Probe
from moco_dist.method.build import build_method, settled
from moco_dist.report.while_training import Showing
from moco_dist.run import checkpoint
from moco_dist.run.folder import RunFolder
from moco_dist.run.logbook import Logbook
from moco_dist.run.manifest import facts_of
from moco_dist.run.opening import opening_lines
from moco_dist.run.resume import facts_to_agree_on, resume, training_images
from moco_dist.run.saver import Saver
from moco_dist.run.trace import StepTrace
from moco_dist.tracking import Tracker


def pretrain(config: PretrainConfig, world: World, tracker: Tracker) -> Path:
    """Train to the end of the schedule (or run.stop_at_step), from the newest checkpoint of the run's folder if any.

    Returns:
        the folder of the last checkpoint.

    Raises:
        UserError: the data cannot be read, the folder holds another run, or the loss is no number.
        Preempted: a scheduler, or a person, asked to stop, and the run is saved.
    """
    config = settled(config)
    stop_request = StopRequest(config.checkpoint.every_seconds, world)
    images = training_images(config, world)
    plan = plan_of(config, len(images.paths))
    filling = filling_steps(config, plan)
    require_agreement(facts_to_agree_on(config, images), world)
    total_steps = config.optim.epochs * plan.steps_per_epoch
    stop = min(total_steps, config.run.stop_at_step or total_steps)
    probe = Probe(config, images, plan.steps_per_epoch, stop, world)
    method = build_method(config, world)
    notes, pending_losses = resume(method, config, images, world)
    logbook = Logbook(config, world, method.step, stop, pending_losses, tracker.log_metrics)
    for line in [*notes, *opening_lines(config, plan, method, stop, world), *probe.notes()]:
        logbook.say(line)
    saver = Saver(config, facts_of(config, images), plan.steps_per_epoch, stop, world, logbook.say)
    showing = Showing(config, images, tracker, plan.steps_per_epoch, total_steps, logbook.say)
    showing.reached(method.step)
    trace = StepTrace(config, world, tracker, logbook.say)
    colour = compiled_on_gpu(apply_colours, config.engine, world.device)
    views_of = functools.partial(
        views_of_steps, images, config, plan, world, dtype=method.dtype, colour=colour,
        must_end=stop_request.ends_waiting,
        # A rank alone saves without its batch; among others the step that they are in the midst of needs the batch.
        on_lost=stop_request.fail if world.world_size > 1 else None,
    )  # fmt: skip
    feed = views_of(start=method.step, stop=stop)

    try:
        if filling and not method.step:
            logbook.say(f"fills the queue with the keys of {len(filling)} batches before the first step")
            with logbook.paused():
                method.fill_queue(
                    until_asked(views_of(start=filling.start, stop=filling.stop), config, stop_request, world)
                )
        trace.reached(method.step)
        for views, wait_seconds in feed:
            lr = learning_rate(config.optim, method.step, plan.steps_per_epoch)
            result = method.train_step(views, lr, monitored=logbook.is_due(method.step + 1))
            logbook.add(result.loss, wait_seconds, views.replaced)
            step, asked = method.step, stop_request.agreed(method.step)
            trace.reached(step)
            if logbook.is_due(step) or saver.is_due(step, asked):
                require_finite(logbook, config, plan)
            if logbook.is_due(step):
                logbook.write(step, step / plan.steps_per_epoch, lr, result.scalars)
                showing.logged()
            if probe.is_due(step):
                with logbook.paused():
                    logbook.record({"step": step, **probe.measure(method.query_encoder)})
            if saver.is_due(step, asked):
                with logbook.paused():
                    saver.save(method, logbook.pending_losses())
                showing.reached(step)
            if asked in (STOP, FAILED) and step != stop:
                saver.finish()
                raise ended_early(asked, step, stop_request, config, world)
        saver.finish()
        checkpoint.export_backbone(method, RunFolder(config.run.dir).backbone, world)
        showing.finish(method.step)
        return checkpoint.latest(config.run.dir)
    except LoadingError:
        if world.world_size > 1:
            raise  # saved above, if there was a batch to finish the step with; not so where its storage hangs
        saver.save(method, logbook.pending_losses())
        saver.finish()
        if stop_request.ends_waiting():
            raise ended_early(STOP, method.step, stop_request, config, world) from None
        raise
    finally:
        feed.close()
        trace.close()
        showing.close()
        logbook.close()


def until_asked(
    feed: Generator[tuple[Views, float], None, None], config: PretrainConfig, stop_request: StopRequest, world: World
) -> Generator[Views, None, None]:
    """The views that fill the queue. Where it ends early, the run begins anew.

    Raises:
        Preempted: a scheduler, or a person, asked to stop.
        LoadingError: a rank cannot go on loading.
    """
    with contextlib.closing(feed):
        for batch, (views, _) in enumerate(feed, 1):
            yield views
            asked = stop_request.agreed(batch)
            if asked in (STOP, FAILED):
                raise ended_early(asked, 0, stop_request, config, world)


def ended_early(
    asked: int, step: int, stop_request: StopRequest, config: PretrainConfig, world: World
) -> Preempted | LoadingError:
    """Why all ranks end after `step`, which is saved: STOP, which marks the run's folder for launchers, or FAILED."""
    if asked == FAILED:
        return stop_request.failure or LoadingError(f"another rank cannot load; saved at step {step}")
    if world.is_main:
        RunFolder(config.run.dir).stopped.write_text(json.dumps({"step": step}))
    return Preempted(step)


def require_finite(logbook: Logbook, config: PretrainConfig, plan: Plan) -> None:
    """Stop if a loss since the last log step is not a number. Called by all ranks.

    The engine has left out the steps with such a loss, so no such step has touched what was or will be saved.

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
