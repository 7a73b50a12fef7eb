"""A run that was stopped and goes on is the run that was not, on the same and on another number of ranks."""

import json
import resource

import numpy as np
import pytest
import safetensors.torch
import torch

from moco_dist.data.images import ImageFolder
from moco_dist.data.names import Names
from moco_dist.data.plan import Plan, filling_steps
from moco_dist.distributed.collectives import barrier, gather_uneven
from moco_dist.errors import UserError
from moco_dist.method.build import build_method
from moco_dist.run import checkpoint
from moco_dist.run.manifest import MANIFEST, read_manifest
from moco_dist.run.resume import resume
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, saver_for, small_config, views_at
from tests.world import run

STEPS = 6


def train(world, run_dir, config, start, stop, save_at=()):
    """Steps start .. stop-1, from the newest checkpoint when start > 0; the outcome as plain tensors."""
    method = build_method(config, world)
    if start:
        checkpoint.load(method, checkpoint.latest(run_dir), world)
    assert method.step == start
    plan, table = Plan(NUM_SAMPLES, config.optim.global_batch_size, config.run.seed), images()
    table = table.to(next(method.query_encoder.parameters()).dtype)
    if start == 0 and (filling := filling_steps(config, plan)):
        method.fill_queue(views_at(table, plan, step, world) for step in filling)
    losses = []
    saver = saver_for(run_dir, world, print, keep_last=2, keep_every_steps=0)
    for step in range(start, stop):
        views = views_at(table, plan, step, world)
        result = method.train_step(views, 0.02, False)
        losses.append(gather_uneven(result.loss[None], world).mean().item())
        if method.step in save_at:
            saver.save(method, [])
    saver.finish()
    tensors = {name: tensor.clone() for name, tensor in checkpoint.replicated_tensors(method).items()}
    for name, encoder in method.encoders.items():
        tensors |= {f"{name}.{k}": v for k, v in checkpoint.averaged(encoder, world).items()}
    return losses, {**tensors, "queue": gather_uneven(method.queue.keys, world)}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_same_ranks_resume_bit_by_bit(tmp_path, precision):
    config = small_config(optim={"precision": precision})
    whole = run(train, 2, tmp_path / "whole", config, 0, STEPS, (3,))[0]
    run(train, 2, tmp_path / "parts", config, 0, 3, (3,))
    resumed = run(train, 2, tmp_path / "parts", config, 3, STEPS)[0]
    assert resumed[0] == whole[0][3:]
    assert largest_difference(resumed[1], whole[1]) == 0.0


def test_any_number_of_ranks_goes_on(tmp_path):
    """4 -> 2 -> 1 -> 4 ranks, against one process that was never stopped."""
    config = small_config()
    expected = run(train, 1, tmp_path / "alone", config, 0, 8)[0]
    losses = []
    for world_size, start in ((4, 0), (2, 2), (1, 4), (4, 6)):
        part, tensors = run(train, world_size, tmp_path / "moving", config, start, start + 2, (start + 2,))[0]
        losses += part
    assert largest_difference(losses, expected[0]) < 1e-10
    assert largest_difference(tensors, expected[1]) < 1e-10


@pytest.mark.parametrize("symmetric", [False, True])
def test_any_number_of_ranks_goes_on_with_a_queue_that_began_with_keys(tmp_path, symmetric):
    """2 -> 1 -> 4 ranks, one step each: most of the queue is still what it was filled with before the first one."""
    moco = {"queue_start": "keys", "symmetric": symmetric, "queue_size": 256 if symmetric else 128}
    config = small_config(moco=moco)
    expected = run(train, 1, tmp_path / "alone", config, 0, 3)[0]
    losses = []
    for start, world_size in enumerate((2, 1, 4)):
        part, tensors = run(train, world_size, tmp_path / "moving", config, start, start + 1, (start + 1,))[0]
        losses += part
    assert largest_difference(losses, expected[0]) < 1e-10
    assert largest_difference(tensors, expected[1]) < 1e-10


def save_steps(world, run_dir, steps, keep_every_steps=0):
    config = small_config()
    method = build_method(config, world)
    saver = saver_for(run_dir, world, print, keep_last=2, keep_every_steps=keep_every_steps)
    for method.step in steps:
        saver.save(method, [])
    saver.finish()
    return checkpoint.latest(run_dir).name


def test_the_newest_are_kept_and_no_pickle_is_written(tmp_path):
    run(save_steps, 2, tmp_path, (1, 5, 30))
    kept = checkpoint.complete_checkpoints(tmp_path)
    assert [folder.name for folder in kept] == ["step_00000005", "step_00000030"]
    assert checkpoint.latest(tmp_path) == kept[-1]
    files = [file for file in kept[-1].iterdir() if file.name != checkpoint.MANIFEST]
    assert {file.suffix for file in files} == {".safetensors"}
    assert json.loads((kept[-1] / checkpoint.MANIFEST).read_text())["step"] == 30


def test_some_are_kept_for_ever(tmp_path):
    assert run(save_steps, 1, tmp_path, (10, 15, 20, 25, 30, 35), 10) == ["step_00000035"]
    kept = [folder.name[-2:] for folder in checkpoint.complete_checkpoints(tmp_path)]
    assert kept == ["10", "20", "30", "35"]


def damage_seen(world, run_dir):
    return checkpoint.damage(checkpoint.latest(run_dir), world)


def test_every_byte_is_checked(tmp_path):
    run(save_steps, 2, tmp_path, (1,))
    assert run(damage_seen, 2, tmp_path) == ["", ""]
    file = sorted(checkpoint.latest(tmp_path).glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert all("another content" in text and file.name in text for text in run(damage_seen, 2, tmp_path))
    file.write_bytes(content[:1000])
    assert "1000 bytes instead of" in run(damage_seen, 1, tmp_path)[0]
    file.unlink()
    assert "is missing" in run(damage_seen, 3, tmp_path)[2]


def save_on_a_full_disk(world, run_dir):
    """A checkpoint that fits, one that does not, and one that does again."""
    said = []
    method = build_method(small_config(), world)
    saver = saver_for(run_dir, world, said.append, keep_last=2, keep_every_steps=0)
    saver.save(method, [])
    saver.finish()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    method.step = 1
    saver.save(method, [])
    with pytest.raises(UserError, match="not written: file too large"):
        saver.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    kept = [folder.name for folder in checkpoint.complete_checkpoints(run_dir)]
    method.step = 2
    saver.save(method, [])
    saver.finish()
    return kept, said, checkpoint.latest(run_dir).name


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_is_survived(tmp_path, world_size):
    for kept, said, last in run(save_on_a_full_disk, world_size, tmp_path):
        assert kept == ["step_00000000"]
        assert len(said) == 1
        assert "no checkpoint at step 1: file too large" in said[0]
        assert last == "step_00000002"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def save_where_no_folder_can_be_made(world, run_dir):
    said, place = [], run_dir / "checkpoints"
    method = build_method(small_config(), world)
    saver = saver_for(run_dir, world, said.append, keep_last=2, keep_every_steps=0)
    saver.save(method, [])
    with pytest.raises(UserError, match="last checkpoint was not written"):
        saver.finish()
    if world.is_main:
        place.unlink()
    barrier(world)
    method.step = 1
    saver.save(method, [])
    saver.finish()
    return len(said), checkpoint.latest(run_dir).name


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_that_cannot_be_made_is_a_failure_of_all_ranks(tmp_path, world_size):
    """As with no inode left: a rank that gave up alone would leave the others in a collective."""
    (tmp_path / "checkpoints").touch()
    assert run(save_where_no_folder_can_be_made, world_size, tmp_path) == [(1, "step_00000001")] * world_size


def test_a_checkpoint_without_its_manifest_is_not_one(tmp_path):
    run(save_steps, 1, tmp_path, (1, 2))
    (checkpoint.latest(tmp_path) / MANIFEST).unlink()
    assert checkpoint.latest(tmp_path).name == "step_00000001"
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_manifest(tmp_path / "checkpoints" / "step_00000002")


def load_into(world, run_dir, **overrides):
    method = build_method(small_config(**overrides), world)
    try:
        checkpoint.load(method, checkpoint.latest(run_dir), world)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "overrides",
    [{"moco": {"queue_size": 128}}, {"model": {"embedding_dim": 24}}, {"model": {"arch": "resnet18"}}],
    ids=str,
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, overrides):
    run(save_steps, 1, tmp_path, (1,))
    message = run(load_other, 1, tmp_path, overrides)[0]
    assert message
    assert "step_00000001" in message


def load_other(world, run_dir, overrides):
    return load_into(world, run_dir, **overrides)


def test_a_damaged_file_is_named(tmp_path):
    run(save_steps, 1, tmp_path, (1,))
    folder = checkpoint.latest(tmp_path)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    assert "damaged" in run(load_into, 1, tmp_path)[0]


def export(world, run_dir):
    method = build_method(small_config(), world)
    for buffer in method.query_encoder.buffers():
        if buffer.is_floating_point():
            buffer.fill_(1.0 + world.rank)  # ranks have seen different samples
    checkpoint.export_backbone(method, run_dir / "backbone.safetensors", world)
    return {name: p.detach() for name, p in method.query_encoder.named_parameters()}


def test_the_exported_backbone_has_torchvisions_names(tmp_path):
    from torchvision.models.resnet import BasicBlock, ResNet

    weights = run(export, 2, tmp_path)[0]
    tensors = safetensors.torch.load_file(tmp_path / "backbone.safetensors")
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    missing = model.load_state_dict(tensors, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert not missing.unexpected_keys
    assert torch.equal(tensors["conv1.weight"], weights["backbone.conv1.weight"])
    assert tensors["bn1.running_mean"].unique().tolist() == [1.5]  # the mean over ranks


def export_to_a_full_disk(world, run_dir):
    method = build_method(small_config(), world)
    (path := run_dir / "backbone.safetensors").write_bytes(b"older")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match="File too large"):  # of which the command makes one line
        checkpoint.export_backbone(method, path, world)
    return [(file.name, file.stat().st_size) for file in run_dir.iterdir()]


def test_a_backbone_is_there_whole_or_not_at_all(tmp_path):
    assert run(export_to_a_full_disk, 1, tmp_path) == [[("backbone.safetensors", 5)]]


def resume_and_save(world, run_dir, steps, keep_last):
    """As a training that goes on from the newest intact checkpoint."""
    config = small_config(run={"dir": run_dir})
    method = build_method(config, world)
    images = ImageFolder(run_dir, Names.of(["a/1.jpg"]), np.zeros(1, np.int64), ("a",))
    notes, _ = resume(method, config, images, world)
    start = method.step
    saver = saver_for(run_dir, world, print, keep_last=keep_last, keep_every_steps=0)
    for method.step in steps:
        saver.save(method, [])
    saver.finish()
    return start, notes


def no_json(folder):
    """What a host that lost its power may leave of a file that was not yet on its disk."""
    (folder / MANIFEST).write_bytes(b"")


def cut_off(folder):
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("harm", [no_json, cut_off])
def test_a_damaged_checkpoint_is_passed_over_and_never_kept_in_place_of_an_intact_one(tmp_path, harm):
    run(resume_and_save, 2, tmp_path, (4, 8), 2)
    harm(tmp_path / "checkpoints" / "step_00000008")
    start, notes = run(resume_and_save, 2, tmp_path, (6,), 1)[1]
    assert start == 4
    assert len(notes) == 1
    assert "step_00000008 is damaged and set aside as damaged_step_00000008" in notes[0]
    assert [folder.name for folder in checkpoint.complete_checkpoints(tmp_path)] == ["step_00000006"]
    assert run(resume_and_save, 1, tmp_path, (), 1) == [(6, [])]


def test_where_no_checkpoint_is_intact_none_is_set_aside(tmp_path):
    """Or the next start would begin anew, without a word."""
    run(resume_and_save, 1, tmp_path, (4,), 1)
    cut_off(tmp_path / "checkpoints" / "step_00000004")
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint of .* is intact"):
            run(resume_and_save, 1, tmp_path, (), 1)
