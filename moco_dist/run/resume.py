"""Going on with a run: from which checkpoint, under which settings, and whether all ranks mean the same."""

from pathlib import Path
from typing import Any

from moco_dist.config.pretrain import PretrainConfig, shuffle_block
from moco_dist.config.section import COMPUTED
from moco_dist.config.source import declarations, flatten, to_yaml
from moco_dist.data.images import ImageFolder
from moco_dist.data.sources import find_training_images
from moco_dist.distributed.collectives import barrier
from moco_dist.distributed.once import from_rank_0, once_a_host
from moco_dist.distributed.world import World
from moco_dist.engine.schedule import learning_rate
from moco_dist.errors import InfrastructureError, UserError
from moco_dist.files import write_whole
from moco_dist.method.step import Method
from moco_dist.provenance import package_versions, source_hash
from moco_dist.run import checkpoint
from moco_dist.run.folder import RunFolder
from moco_dist.run.image_list import are_gone, difference, keep_list
from moco_dist.run.known_data import has_trained_on, missed_if_gone
from moco_dist.run.manifest import read_manifest, saved_config, without_secrets
from moco_dist.run.start import begin_with_weights


def training_images(config: PretrainConfig, world: World) -> ImageFolder:
    """The images that a run goes over, all or `data.max_samples` of them; one rank of each host looks.

    Raises:
        InfrastructureError: data.root is gone, from which the run of this folder has a checkpoint.
        UserError: there is no such data set, or no image in it.
    """
    return once_a_host(lambda: _training_images(config), f"{config.data.root} {config.data.max_samples}", world)


def _training_images(config: PretrainConfig) -> ImageFolder:
    root, run_dir = config.data.root, config.run.dir
    with missed_if_gone(root, has_trained_on(root, run_dir), run_dir):
        return find_training_images(config.data, RunFolder(run_dir).indices)


def resume(method: Method, config: PretrainConfig, images: ImageFolder, world: World) -> tuple[list[str], list[float]]:
    """Load the newest intact checkpoint of the run's folder, or else `model.init`; write the resolved config.

    Args:
        method: what to fill.
        config: settings of this start.
        images: what is trained on.
        world: this process.

    Returns:
        lines about `model.init`, checkpoints that were passed over and images that changed, and the losses of the log
        interval that was under way.

    Raises:
        UserError: the checkpoint was made with settings that compute something else (each is named), by another
            version, or over other images; or none is intact; or `model.init` does not fit.
    """
    run = RunFolder(config.run.dir)
    damaged: dict[Path, str] = {}
    pending_losses: list[float] = []
    other_images, begun_with = "", []
    # What rank 0 sees counts: a shared file system may show a new folder to some hosts a little later.
    seen = from_rank_0(lambda: [folder.name for folder in checkpoint.complete_checkpoints(config.run.dir)], world)
    for name in reversed(seen):
        folder = run.checkpoints / name
        if problem := checkpoint.damage(folder, world):
            damaged[folder] = problem
            continue
        other_images, pending_losses = from_rank_0(lambda folder=folder: _what_goes_on(config, images, folder), world)
        checkpoint.load(method, folder, world)
        break
    else:
        if damaged:
            lines = [f"{folder.name} is damaged: {problem}" for folder, problem in damaged.items()]
            raise UserError("\n".join([*lines, f"no checkpoint of {config.run.dir} is intact; give another --run.dir"]))
        begun_with = begin_with_weights(method, config, world)
    notes = begun_with + [
        f"warning: {folder.name} is damaged and set aside as {checkpoint.aside(folder).name}: {problem}"
        for folder, problem in damaged.items()
    ]
    if other_images:
        notes.append(f"warning: goes on over other images than before: {other_images}")
    if world.is_main:
        for folder in damaged:
            checkpoint.set_aside(folder)
        run.stopped.unlink(missing_ok=True)
        keep_list(images, run)
        write_whole(run.config, to_yaml(without_secrets(config)).encode())
    barrier(world)
    return notes, pending_losses


def _what_goes_on(config: PretrainConfig, images: ImageFolder, folder: Path) -> tuple[str, list[float]]:
    """What became of the images, and the losses of the log interval under way; a UserError if `config` does not fit."""
    refuse_changes(config, folder)
    return refuse_other_images(config, images, folder), read_manifest(folder)["pending_losses"]


def refuse_changes(config: PretrainConfig, folder: Path) -> None:
    """Compare with the settings that a checkpoint was made with.

    With run.resume `changed`, all but shapes may differ, the batch and the schedule too.

    Raises:
        UserError: settings that change what is computed differ; each is named.
    """
    saved, now = (
        {**flatten(c), "shuffle.block_size": shuffle_block(c)} for c in (saved_config(folder), config)
    )  # fmt: skip
    settings = declarations(PretrainConfig)
    changed = [
        f"{name}: {saved[name]} in {folder.name}, now {value}"
        for name, value in now.items()
        if settings[name]["changes"] in COMPUTED and value != saved[name]
    ]
    has_other_shapes = any(settings[line.partition(":")[0]]["changes"] == "shapes" for line in changed)
    if has_other_shapes or (changed and config.run.resume != "changed"):
        how = "give another --run.dir or these settings again" if has_other_shapes else (
            "give another --run.dir, these settings again, or --run.resume changed to go on all the same")  # fmt: skip
        raise UserError("\n".join([f"{config.run.dir} holds a run with other settings; {how}:", *changed]))


def refuse_other_images(config: PretrainConfig, images: ImageFolder, folder: Path) -> str:
    """Compare with the list of images that a checkpoint was made over; a checkpoint without a list goes on over any.

    Returns:
        with run.resume `changed`, what became of the list and of the schedule; "" where the list is the same.

    Raises:
        InfrastructureError: in the folder that the run was trained on, all of its images are gone and others are there.
        UserError: the list is another one, and run.resume is `auto`.
    """
    manifest = read_manifest(folder)
    before = manifest["images"]
    changed = before and difference(images, before, RunFolder(config.run.dir))
    if not before or not changed:
        return ""
    step, was = manifest["step"], saved_config(folder).optim
    epoch_was, epoch_now = before["count"] // was.global_batch_size, len(images.paths) // config.optim.global_batch_size
    end_now, end_was = config.optim.epochs * epoch_now, was.epochs * epoch_was
    schedule = (
        f"an epoch is {epoch_now:,} steps instead of {epoch_was:,}, the run ends at step {end_now:,} instead of "
        f"{end_was:,}, and "
    )
    if step < end_now:
        schedule += (
            f"the learning rate at step {step:,} is {learning_rate(config.optim, step, epoch_now):.4g} instead of "
            f"{learning_rate(was, step, epoch_was):.4g}"
        )
    else:
        schedule += f"nothing is left to train at step {step:,}"
    if config.run.resume == "changed":
        return f"{changed}; {schedule}"
    if has_trained_on(config.data.root, config.run.dir) and are_gone(images, before, RunFolder(config.run.dir)):
        raise InfrastructureError(
            f"none of the {before['count']:,} images that {config.run.dir} was trained on is in {images.root} any more "
            f"({changed}): was their folder renamed, or is a disk not mounted? Give the same images, another "
            f"--run.dir, or --run.resume changed to go on over what is there: {schedule}"
        )
    raise UserError(f"{config.run.dir} holds a run over other images ({folder.name}): {changed}; give the same images, "
                    f"another --run.dir, or --run.resume changed to go on over these: {schedule}")  # fmt: skip


def facts_to_agree_on(config: PretrainConfig, folder: ImageFolder) -> dict[str, Any]:
    """What must be the same on every rank: settings, versions, and the list of images."""
    settings = declarations(PretrainConfig)
    return {
        **{name: v for name, v in flatten(without_secrets(config)).items() if not settings[name]["per_host"]},
        **{f"version of {name}": version for name, version in package_versions().items()},
        "source of moco_dist (hash)": source_hash(),
        "number of images": len(folder.paths),
        "list of images (hash)": folder.list_hash[:16],
    }
