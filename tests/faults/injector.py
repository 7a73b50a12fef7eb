"""A training that dies: SIGKILL of a chosen rank at its n-th event, wherever that is."""

import json
import os
import shutil
import signal
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchvision.models.resnet import ResNet

from moco_dist.data.plan import Plan
from moco_dist.method import encoder
from moco_dist.method.build import build_method
from moco_dist.run import checkpoint
from tests.distributed.program import NUM_SAMPLES, images, saver_for, small_config, views_at

STEPS, SAVE_EVERY = 6, 2
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
# What counts as an event, before it and after it: collectives of the training and of the checkpoint's thread, and
# every change that a checkpoint makes to the disk.
PLACES = (
    (dist, ALL_GATHER), (dist, "all_to_all_single"), (dist, "barrier"), (dist, "all_gather_object"),
    (dist, "gather_object"), (dcp.HuggingFaceStorageWriter, "prepare_local_plan"),
    (dcp.HuggingFaceStorageWriter, "write_data"), (dcp.HuggingFaceStorageWriter, "finish"),
    (shutil, "rmtree"), (os, "fsync"), (Path, "rename"),
)  # fmt: skip


class NarrowResNet(ResNet):
    """1/60 of the weights. What happens is the same, and a checkpoint is written in no time."""

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fc = nn.Linear(512 // 8, 1)


class Events:
    """Counts events, and kills this process at the chosen one."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self._kill_at = 0, kill_at

    def watch(self, owner, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            self.happen()
            result = original(*args, **kwargs)
            self.happen()
            return result

        setattr(owner, name, watched)

    def happen(self) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(world, run_dir, kill_rank=None, kill_at=None):
    """To the last step from the newest checkpoint; rank 0 appends (step, loss) to losses.jsonl.

    Returns:
        this rank's number of events, the step it started from, and the final method.
    """
    config = small_config(model={"bn_group_size": 4}, optim={"global_batch_size": 16})
    encoder.ResNet = NarrowResNet  # in this process, which is not used again
    events = Events(kill_at if world.rank == kill_rank else None)
    for owner, name in PLACES:
        events.watch(owner, name)
    method = build_method(config, world)
    if found := checkpoint.complete_checkpoints(run_dir):
        assert checkpoint.damage(found[-1], world) == ""
        checkpoint.load(method, found[-1], world)
    start = method.step
    plan, table = Plan(NUM_SAMPLES, config.optim.global_batch_size, config.run.seed), images()
    table = table.to(next(method.query_encoder.parameters()).dtype)
    saver = saver_for(run_dir, world, print, keep_last=2, keep_every_steps=0)
    for step in range(start, STEPS):
        views = views_at(table, plan, step, world)
        result = method.train_step(views, 0.02, False)
        with (run_dir / f"losses_{world.rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, result.loss.item()]) + "\n")
        if method.step % SAVE_EVERY == 0:
            saver.save(method, [])
    saver.finish()
    tensors = {name: tensor.clone() for name, tensor in checkpoint.replicated_tensors(method).items()}
    return events.count, start, {**tensors, "queue": method.queue.keys.clone()}
