"""What a run's log says about it."""

import math
import statistics
from pathlib import Path
from typing import Any

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.doctor.finding import Finding, fine, problem, warning
from moco_dist.run import checkpoint
from moco_dist.run.folder import RunFolder
from moco_dist.run.logbook import read_log
from moco_dist.run.weights import imported_from

COLLAPSED_STD = 0.1  # of 1; a network that has just been made is near it too, so only trained ones are judged
CHANCE_NATS = 0.15  # from ln(K + 1): random unit vectors in 128 dimensions at tau 0.2 are 0.1 above
CHANCE_TOP1 = 5.0  # percent
WAIT_SHARE, LARGE_WAIT_SHARE = 0.1, 0.5
SLOWER = 0.7  # of the earlier rate
LAST_ROWS = 5


def run(run_dir: Path) -> list[Finding]:
    """Findings about the run in a folder.

    Raises:
        UserError: it is not the folder of a run.
    """
    config = RunFolder(run_dir).settings()
    everything = read_log(run_dir)
    if everything and "not_finite" in everything[-1] and "loss" not in everything[-1]:
        loss, step = everything[-1]["not_finite"], everything[-1]["step"] - 1
        return [problem("loss", f"{loss} at step {step}, which ended the run: a lower optim.base_lr, or a warm-up "
                        "(optim.warmup_epochs)")]  # fmt: skip
    rows = [row for row in everything if "loss" in row]
    if not rows and (file := imported_from(run_dir)):
        return [fine("run", f"its backbone was imported from {file}, so there is no training to look at")]
    if not rows:
        return [warning("log", "no step is logged yet (log.every_steps "
                        f"{config.log.every_steps}); if it stays so, look at what the ranks print")]  # fmt: skip
    found = [*_loss(rows, config), *_speed(rows, config), *_end(rows, run_dir)]
    return found or [fine("run", f"{len(rows)} log lines up to step {rows[-1]['step']}: nothing is unusual")]


def _loss(rows: list[dict[str, Any]], config: PretrainConfig) -> list[Finding]:
    batch, method = config.optim.global_batch_size, config.of_method
    fill_steps = 0 if method.num_filling_batches(batch) else -(-method.queue_keys // batch)
    last, chance = rows[-1], math.log(method.num_negatives(batch) + 1)
    recent = rows[-LAST_ROWS:]
    loss, std, top1 = (statistics.median(row[key] for row in recent)
                       for key in ("loss", "embedding_std", "contrastive_top1"))  # fmt: skip
    if last["step"] <= 2 * fill_steps:
        return _filling(rows, fill_steps)
    found = []
    if std < COLLAPSED_STD:
        found.append(problem("collapse", f"embedding_std is {std:.3f} (1 fills the sphere): all images get one "
                             "embedding; start again with optim.warmup_epochs or a lower optim.base_lr"))  # fmt: skip
    if abs(loss - chance) < CHANCE_NATS and top1 < CHANCE_TOP1:
        found.append(problem("chance", f"loss {loss:.3f} is {method.chance_formula} = {chance:.3f} and top-1 "
                             f"{top1:.1f} %: nothing is learned; check the learning rate, and the views with "
                             "moco-dist report"))  # fmt: skip
    low = min(rows, key=lambda row: row["loss"])
    settled = [row for row in rows if row["step"] > 2 * fill_steps]
    if len(settled) >= 3 * LAST_ROWS:
        first = statistics.median(row["loss"] for row in settled[:LAST_ROWS])
        if loss > first + CHANCE_NATS:
            found.append(warning("loss", f"rose from {first:.2f} to {loss:.2f} after the queue was full (lowest: "
                                 f"{low['loss']:.2f} at step {low['step']}): a lower optim.base_lr"))  # fmt: skip
    groups = config.optim.global_batch_size // config.model.bn_group_size
    if groups == 1 and top1 > 95:
        found.append(problem("BN groups", f"top-1 is {top1:.0f} % with one BN group: the network reads pairs off their "
                             "common statistics; a smaller model.bn_group_size"))  # fmt: skip
    return found


def _filling(rows: list[dict[str, Any]], fill_steps: int) -> list[Finding]:
    """While random keys are still being replaced, the loss says little; a rise then is what users ask about."""
    low = min(range(len(rows)), key=lambda i: rows[i]["loss"])
    rise = max(row["loss"] for row in rows[low:]) - rows[low]["loss"]
    until = f"the queue holds only real keys from step {fill_steps} on"
    if rise > 0.05:
        return [fine("loss", f"it rose by {rise:.2f} from step {rows[low]['step']} on; that is normal while real keys "
                        f"replace random ones, which are easier to tell apart: {until}")]  # fmt: skip
    return [fine("loss", f"{rows[-1]['loss']:.3f} at step {rows[-1]['step']}; too early to judge: {until}")]


def _speed(rows: list[dict[str, Any]], config: PretrainConfig) -> list[Finding]:
    found = []
    waits = statistics.median(row["data_wait_share"] for row in rows[-2 * LAST_ROWS :])
    if waits > WAIT_SHARE:
        steps = ["more data.num_workers"]
        steps += ["--data.loader ffcv or dali"] if config.data.loader == "torchvision" else []
        steps += ["--shuffle.exchange all_to_all (decodes once)"] if config.shuffle.exchange == "loader" else []
        level = "error" if waits > LARGE_WAIT_SHARE else "warning"
        found.append(Finding(level, "data", f"steps wait {100 * waits:.0f} % of their time for images: loading is "
                             f"slower than the step; {', or '.join(steps)}"))  # fmt: skip
    rates = [row["images_per_second"] for row in rows]
    if len(rates) >= 4 * LAST_ROWS:
        before, now = statistics.median(rates[:-LAST_ROWS]), statistics.median(rates[-LAST_ROWS:])
        if now < SLOWER * before:
            found.append(warning("speed", f"{now:,.0f} images/s where it was {before:,.0f}: another job, hot GPUs, "
                                 "or slower storage; compare data_wait_share then and now"))  # fmt: skip
    return found


def _end(rows: list[dict[str, Any]], run_dir: Path) -> list[Finding]:
    saved = checkpoint.complete_checkpoints(run_dir)
    if RunFolder(run_dir).stopped.is_file():
        return [fine("stopped", f"on request at step {rows[-1]['step']}; the same command goes on")]
    if not saved:
        return [warning("checkpoint", "none is complete yet: see checkpoint.every_steps and every_seconds")]
    return []
