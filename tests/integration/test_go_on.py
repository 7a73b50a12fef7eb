"""A run that goes on over other images, or from a checkpoint of another version."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.images import ImageFolder
from moco_dist.data.names import Names
from moco_dist.errors import EXIT_IO, EXIT_MISTAKE, UserError
from moco_dist.provenance import package_versions
from moco_dist.run.checkpoint import complete_checkpoints
from moco_dist.run.folder import RunFolder
from moco_dist.run.image_list import difference, keep_list, listed
from moco_dist.run.logbook import read_log
from moco_dist.run.manifest import read_manifest
from moco_dist.run.resume import refuse_changes

TINY = [
    "--model.arch", "resnet10", "--model.stem", "cifar", "--model.head-hidden-dims", "[64]",
    "--model.bn-group-size", "4", "--moco.queue-size", "32", "--moco.momentum", "0.9", "--optim.global-batch-size", "8",
    "--optim.epochs", "4", "--data.image-size", "32", "--data.num-workers", "0", "--log.every-steps", "1",
    "--tracking.backend", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Three classes of eight images, and a run that was stopped at step 6 of 12."""
    folder = tmp_path_factory.mktemp("stopped")
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 40, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / "data" / "train" / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    assert pretrain(folder, "--run.stop-at-step", "6") == 0
    return folder


def pretrain(folder, *flags):
    return main(["pretrain", "--data.root", str(folder / "data"), "--run.dir", str(folder / "run"), *TINY, *flags])


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "copy")


def test_other_images_are_refused_and_named(run, capsys):
    (run / "data" / "train" / "new").mkdir()
    (run / "data" / "train" / "a" / "0.jpg").rename(run / "data" / "train" / "new" / "0.jpg")
    for path in (run / "data" / "train" / "b").iterdir():
        path.unlink()
    assert pretrain(run) == 2
    told = capsys.readouterr().err
    assert "holds a run over other images (step_00000006): 1 came (new/0.jpg), 9 went (a/0.jpg, b/1.jpg, ...);" in told
    schedule = (
        "an epoch is 2 steps instead of 3, the run ends at step 8 instead of 12, and the learning rate at step 6 is "
        "0.0001373 instead of 0.00046"
    )
    assert f"--run.resume changed to go on over these: {schedule}" in told
    assert len(told.splitlines()) == 1

    assert pretrain(run, "--run.resume", "changed") == 0
    assert "warning: goes on over other images than before: 1 came (new/0.jpg), 9 went" in capsys.readouterr().out
    assert [row["step"] for row in read_log(run / "run")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert pretrain(run) == 0  # these are its images now
    assert "other images" not in capsys.readouterr().out


def test_images_for_which_the_run_is_over_already_are_refused_with_that_word(run, capsys):
    for path in sorted((run / "data" / "train").rglob("*.jpg"))[8:]:
        path.unlink()
    assert pretrain(run) == 2
    told = capsys.readouterr().err
    assert "the run ends at step 4 instead of 12, and nothing is left to train at step 6" in told


def test_a_folder_that_was_renamed_where_the_run_had_trained_is_no_mistake(run, capsys):
    """Without a val, what is left of data.root is a folder of other classes."""
    assert pretrain(run, "--run.stop-at-step", "7") == 0
    (run / "data" / "train").rename(run / "data" / "trian")
    capsys.readouterr()
    assert pretrain(run) == EXIT_IO
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the 24 images that" in line
    assert "was their folder renamed, or is a disk not mounted?" in line
    assert pretrain(run, "--run.resume", "changed", "--run.stop-at-step", "8") == 0
    assert pretrain(run, "--data.root", str(run / "data" / "trian"), "--run.stop-at-step", "8") == EXIT_MISTAKE


def test_another_place_is_no_other_list(run):
    (run / "data").rename(run / "moved")
    assert pretrain(run, "--data.root", str(run / "moved"), "--run.stop-at-step", "7") == 0


def rewrite(run, **changes):
    """Give checkpoint.json other entries; None removes one."""
    [folder] = complete_checkpoints(run / "run")
    manifest = {**json.loads((folder / "checkpoint.json").read_text()), **changes}
    kept = {name: value for name, value in manifest.items() if value is not None}
    (folder / "checkpoint.json").write_text(json.dumps(kept))
    return folder


def test_an_older_checkpoint_goes_on_with_defaults(run, capsys):
    [folder] = complete_checkpoints(run / "run")
    config = read_manifest(folder)["config"]
    del config["run"]["peer_timeout_seconds"], config["shuffle"]
    rewrite(run, config=config, loss_scale=None, images=None, versions=None, pending_losses=None, files=None, git=None)
    assert pretrain(run, "--run.stop-at-step", "7") == 0
    assert "goes on at step 6" in capsys.readouterr().out


def test_a_run_from_before_there_were_blocks_goes_on_unchanged_or_is_told(tmp_path):
    """Its keys were shuffled over the whole batch, which is also today's default up to 256 samples."""

    def config_of(batch, block=None):
        return PretrainConfig.model_validate({
            "run": {"dir": tmp_path}, "data": {"root": "d"}, "optim": {"global_batch_size": batch},
            "shuffle": {"block_size": block},
        })  # fmt: skip

    def checkpoint_of(batch, block, was_known=True):
        config = config_of(batch, block).model_dump(mode="json")
        if not was_known:
            del config["shuffle"]["block_size"]
        (tmp_path / "checkpoint.json").write_text(json.dumps({"step": 1, "world_size": 1, "config": config}))

    for batch in (128, 256):
        checkpoint_of(batch, None, was_known=False)
        refuse_changes(config_of(batch), tmp_path)
    checkpoint_of(1024, None, was_known=False)
    refuse_changes(config_of(1024, 1024), tmp_path)
    with pytest.raises(UserError, match=r"these settings again, .*\nshuffle.block_size: 1024 in .*, now 256$"):
        refuse_changes(config_of(1024), tmp_path)
    checkpoint_of(1024, 256)
    refuse_changes(config_of(1024), tmp_path)  # written down or by default, it is the same size


def test_a_newer_checkpoint_is_refused_with_its_version_and_setting(run, capsys):
    [folder] = complete_checkpoints(run / "run")
    manifest = read_manifest(folder)
    manifest["config"]["optim"]["clip_norm"] = 1.0
    rewrite(run, config=manifest["config"], versions={**manifest["versions"], "moco_dist": "9.1"})
    assert pretrain(run) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    ours = package_versions()["moco_dist"]
    assert f"step_00000006 was written by moco_dist 9.1 with settings that moco_dist {ours} does not take" in told
    assert "unknown setting optim.clip_norm" in told


def test_a_checkpoint_json_without_its_step_is_damage(run, capsys):
    path = rewrite(run, step=None) / "checkpoint.json"
    assert pretrain(run) == 2
    assert f"step_00000006 is damaged: {path} is damaged: step: field required\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entry",
    [
        {"step": "six"},
        {"files": [1]},
        {"files": {"a": {}}},
        {"config": 3},
        {"loss_scale": [1]},
        {"images": {"count": 3}},
    ],
    ids=str,
)
def test_what_no_version_writes_is_damage(tmp_path, entry):
    (tmp_path / "checkpoint.json").write_text(json.dumps({"step": 1, "world_size": 1, **entry}))
    with pytest.raises(UserError, match=f"checkpoint.json is damaged: {next(iter(entry))}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["12", "null", "[]", "{", "\0\0", "[" * 100_000], ids=lambda text: repr(text[:4]))
def test_what_is_no_json_object_is_damage(tmp_path, text):
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(tmp_path)


def images(*paths):
    return ImageFolder("root", Names.of(paths), np.zeros(len(paths), np.int64), ())


def test_a_list_that_was_lost_leaves_the_numbers(tmp_path):
    before = listed(images("a/1.jpg", "a/2.jpg"))
    assert difference(images("a/1.jpg"), before, RunFolder(tmp_path)) == "2 images before, 1 now"
    keep_list(images("a/1.jpg", "a/2.jpg"), RunFolder(tmp_path))
    assert difference(images("a/1.jpg"), before, RunFolder(tmp_path)) == "0 came, 1 went (a/2.jpg)"
    assert difference(images("a/2.jpg", "a/1.jpg"), before, RunFolder(tmp_path)) == "the same images in another order"
    next(tmp_path.iterdir()).write_bytes(b"\x1f\x8b")
    assert difference(images("a/1.jpg"), before, RunFolder(tmp_path)) == "2 images before, 1 now"


def test_names_that_are_not_utf_8_are_kept(tmp_path):
    odd = images("a/caf\udce9.jpg")
    keep_list(odd, RunFolder(tmp_path))
    assert difference(images("b.jpg"), listed(odd), RunFolder(tmp_path)).startswith("1 came (b.jpg), 1 went")
