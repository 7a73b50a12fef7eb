"""`moco-dist detect`: train Faster R-CNN on the backbone, then its average precision on the test set.

A step is a function of (seed, step, rank): torchvision's detector draws short sides and sampled boxes from torch's own
generator, which is set anew at each step. So a training goes on as if it had not been stopped, on a GPU up to the order
of sums; another number of ranks samples other boxes.
"""

import contextlib
import json
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from moco_dist.config.evaluate import DetectConfig
from moco_dist.config.loading import worker_count
from moco_dist.config.pretrain import AugmentConfig
from moco_dist.config.source import what_is_computed
from moco_dist.data.names import hash_of_list
from moco_dist.data.plan import Plan
from moco_dist.data.processes import made_by_processes
from moco_dist.distributed.collectives import all_reduce_sum, gather_uneven
from moco_dist.distributed.once import from_rank_0, once_a_host
from moco_dist.distributed.stop import StopRequest
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.engine.schedule import step_decay
from moco_dist.errors import Preempted, UserError, not_a_multiple
from moco_dist.evaluate.detection.average_precision import average_precision, require_pycocotools
from moco_dist.evaluate.detection.detector import build_detector, weight_groups
from moco_dist.evaluate.detection.voc import Annotated, Pictures, read_sets
from moco_dist.evaluate.progress import SAVE_SECONDS, Curve, Training
from moco_dist.evaluate.subject import digest
from moco_dist.files import key_of, write_whole
from moco_dist.run.checkpoint import averaged
from moco_dist.run.folder import RunFolder
from moco_dist.run.known_data import has_evaluated_on, missed_if_gone, remember
from moco_dist.run.weights import Backbone, backbone_of_run, read_backbone

FLIP_PROBABILITY = 0.5
CURVE_STEPS = 100  # one point of the loss's curve
WARMUP_START = 0.001  # share of the rate, as in detectron2

Batch = list[tuple[int, Tensor]]  # an image's number, uint8 (3, H, W)


def run_detection(config: DetectConfig, world: World) -> dict[str, Any]:
    """Train and test, by all ranks.

    Returns:
        what was written: average precisions in percent, AP50 of each class, the loss's curve, and what it cost.

    Raises:
        UserError: there is no run or no such weights, images and annotations are not as they should be, the batch does
            not divide, or the loss is no number any more.
        Preempted: somebody asked for an end; what was done is kept.
    """
    require_pycocotools()
    started = time.perf_counter()
    if config.global_batch_size % world.world_size:
        ranks = world.world_size
        raise UserError(not_a_multiple("global_batch_size", config.global_batch_size, ranks, f"{ranks} ranks"))
    backbone, pixels = from_rank_0(lambda: _backbone(config), world)
    data = config.data
    out = RunFolder(config.run_dir).detection if config.run_dir else _beside(config.weights)
    record = RunFolder(config.run_dir).data_roots if config.run_dir else out.with_name(f".{out.name}.data_roots")
    lists = sorted(data.root / name for name in {*data.train_sets, *data.test_sets})
    about = f"{data.root} {data.train_sets} {data.test_sets} {data.classes}"
    train, test = once_a_host(lambda: _annotated(config, lists, record, out.parent), about, world)
    for of_set in lists:
        remember(of_set, record, world)
    if len(train) < config.global_batch_size:
        sets, batch = ", ".join(data.train_sets), config.global_batch_size
        raise UserError(f"{sets}: {len(train)} images, less than one batch (global_batch_size {batch})")
    detector = build_detector(backbone, config, pixels, world)
    progress = out.with_name(f".{out.name}_{_key(config, detector, train, world)}.safetensors")
    with StopRequest(SAVE_SECONDS, world) as stop:
        curve = _train(detector, train, config, progress, stop, world)
        images = key_of([str(data.root.resolve()), hash_of_list(item.image.stem for item in test)])
        kept = progress.with_suffix(f".found_{images}_{world.rank}.safetensors")
        found = _detections(detector, test, config, kept, stop, world)
    accuracy, per_class = average_precision(test, found, len(data.classes))
    seconds = time.perf_counter() - started
    result = {
        "step": backbone.step, "num_train": len(train), "num_test": len(test), "accuracy": accuracy,
        "ap50_per_class": dict(zip(data.classes, per_class, strict=True)), "curve": curve, "seconds": round(seconds, 2),
        "device_hours": round(seconds * world.world_size / 3600, 4), "config": config.model_dump(mode="json"),
    }  # fmt: skip
    if world.is_main:
        write_whole(out, json.dumps(result, indent=1).encode())
        progress.unlink(missing_ok=True)
    kept.unlink(missing_ok=True)
    return result


def learning_rate(config: DetectConfig, step: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then a tenth at each milestone."""
    warmup = min(1.0, WARMUP_START + (1 - WARMUP_START) * step / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * warmup * step_decay(config.milestones, step)


def _backbone(config: DetectConfig) -> tuple[Backbone, AugmentConfig]:
    """The backbone, and the settings that have the mean and std of the pixels it was trained on."""
    if config.run_dir is None:
        assert config.weights is not None
        return read_backbone(config.weights, config.arch), AugmentConfig()
    backbone = backbone_of_run(config.run_dir)
    return backbone, RunFolder(config.run_dir).settings().augment


def _annotated(
    config: DetectConfig, lists: list[Path], record: Path, where: Path
) -> tuple[list[Annotated], list[Annotated]]:
    """Training and test images; `lists` are all their sets, each by itself in `record`, since its name may be wrong."""
    data = config.data
    with missed_if_gone(data.root, all(has_evaluated_on(of_set, record) for of_set in lists), where):
        train, test = (read_sets(data.root, sets, data.classes) for sets in (data.train_sets, data.test_sets))
    return train, test


def _beside(weights: Path | None) -> Path:
    assert weights is not None
    return weights.with_name(f"{weights.name}.detection.json")


def _key(config: DetectConfig, detector: nn.Module, train: Sequence[Annotated], world: World) -> str:
    """A hash of all that the training depends on."""
    images = hash_of_list(item.image.stem for item in train)
    settings = what_is_computed(config, without=["data.test_sets"])  # they are read when the training has ended
    return key_of([digest(detector), images, world.world_size, settings])


def _train(
    detector: FasterRCNN,
    train: Sequence[Annotated],
    config: DetectConfig,
    progress: Path,
    stop: StopRequest,
    world: World,
) -> Curve:
    """The whole training, or what is left of it; returns the mean loss of every CURVE_STEPS steps."""
    sgd = torch.optim.SGD(weight_groups(detector, config.weight_decay), lr=config.lr, momentum=config.sgd_momentum)

    def settle() -> None:
        detector.load_state_dict(averaged(detector, world), strict=False)  # on GPUs they are equal already

    training = Training(progress, detector, sgd, stop, world, settle)
    plan = Plan(len(train), config.global_batch_size, config.seed)
    steps = range(training.step, config.steps)
    batches = _batches(train, [plan.query_indices(step, world) for step in steps], config, world)
    detector.train()
    with Told("detector", config.steps, "steps", world, training.step) as told, contextlib.closing(batches):
        for step, batch in zip(steps, batches, strict=True):
            torch.manual_seed(int(np.random.SeedSequence([5, config.seed, step, world.rank]).generate_state(1)[0]))
            images, targets = _flipped(batch, train, world.device)
            loss = torch.stack(list(detector(images, targets).values())).sum()
            sgd.zero_grad()
            loss.backward()
            loss = _share_gradients(detector, loss.detach(), world)
            if not loss.isfinite():
                raise UserError(f"the loss is {loss.item()} at step {step}; a lower lr or a longer warm-up may help")
            for group in sgd.param_groups:
                group["lr"] = learning_rate(config, step)
            sgd.step()
            if step % CURVE_STEPS == 0 and step:
                _add_point(training)
            training.add(loss)
            told.add(note=f"loss {loss.item():.3f}")
    if not training.curve or training.curve[-1]["step"] < config.steps:
        _add_point(training)
    training.save()
    return training.curve


def _add_point(training: Training) -> None:
    training.curve.append({"step": training.step, "loss": round(training.mean_loss(), 4)})


def _batches(
    annotated: Sequence[Annotated], numbers: list[NDArray[np.int64]], config: DetectConfig, world: World
) -> Generator[Batch, None, None]:
    pictures, num_workers = Pictures(annotated), worker_count(config.data.num_workers, world.local_world_size)
    return made_by_processes(
        lambda i: [pictures[number] for number in numbers[i].tolist()], range(len(numbers)), num_workers, 2
    )


def _flipped(batch: Batch, annotated: Sequence[Annotated], device: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images in [0, 1] and their boxes, half of them mirrored. Difficult objects are trained on, as in detectron2."""
    images, targets = [], []
    for (number, picture), draw in zip(batch, torch.rand(len(batch)).tolist(), strict=True):
        image = picture.to(device).float().div_(255)
        boxes, labels = (torch.from_numpy(x).to(device) for x in (annotated[number].boxes, annotated[number].labels))
        if draw < FLIP_PROBABILITY:
            image = image.flip(-1)
            left, top, right, bottom = boxes.unbind(1)
            boxes = torch.stack([image.shape[-1] - right, top, image.shape[-1] - left, bottom], 1)
        images.append(image)
        targets.append({"boxes": boxes, "labels": labels})
    return images, targets


def _share_gradients(detector: nn.Module, loss: Tensor, world: World) -> Tensor:
    """Average gradients over ranks, in place, and the loss with them; returns it."""
    if world.world_size > 1:
        parameters = [p for p in detector.parameters() if p.grad is not None]
        tensors = [loss, *(p.grad for p in parameters if p.grad is not None)]
        flat = all_reduce_sum(torch.cat([t.flatten() for t in tensors]), world) / world.world_size
        loss, *gradients = (
            piece.view_as(t) for piece, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return loss


@torch.no_grad()
def _detections(
    detector: FasterRCNN, test: Sequence[Annotated], config: DetectConfig, kept: Path, stop: StopRequest, world: World
) -> NDArray[np.float64]:
    """(n, 7) of all ranks' images: number, left, top, right, bottom, score, label.

    If this rank was stopped, the file `kept` has those that it had found.
    """
    own = np.arange(world.rank, len(test), world.world_size)
    size = config.global_batch_size // world.world_size
    detector.eval()
    try:
        before = safetensors.torch.load_file(kept)
        found, done = [before["found"].reshape(-1, 7).to(world.device)], int(before["images"])
    except (FileNotFoundError, KeyError, RuntimeError, safetensors.SafetensorError):  # damaged, or nothing is kept
        found, done = [torch.zeros(0, 7, dtype=torch.float64, device=world.device)], 0
    batches = _batches(test, [own[i : i + size] for i in range(done, len(own), size)], config, world)
    with Told("test images", len(own), "images", world, done) as told, contextlib.closing(batches):
        for batch in batches:
            for (number, _), output in zip(batch, detector([p.to(world.device) / 255 for _, p in batch]), strict=True):
                columns = [output["boxes"], output["scores"][:, None], output["labels"][:, None]]
                found.append(torch.cat([torch.full_like(columns[1], number), *columns], 1).double())
            done += len(batch)
            told.add(len(batch))
            if stop.is_asked and done < len(own):
                tensors = {"found": torch.cat(found).cpu(), "images": torch.tensor(done)}
                write_whole(kept, safetensors.torch.save(tensors))
                raise Preempted(f"{done:,} of {len(own):,} test images are done")
    return gather_uneven(torch.cat(found), world).cpu().numpy()
