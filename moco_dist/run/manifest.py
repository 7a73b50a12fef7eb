"""checkpoint.json: what a checkpoint says of itself, as it is written, and read as any version may have written it."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from moco_dist.config.credentials import without_credentials
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import mistakes
from moco_dist.data.images import ImageFolder
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.files import parsed_json
from moco_dist.method.step import Method
from moco_dist.provenance import __version__, git_state, package_versions
from moco_dist.run.image_list import ImageList, listed

MANIFEST = "checkpoint.json"


class FileFacts(TypedDict):
    """Of one file of a checkpoint."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """checkpoint.json: plain facts. `config` is checked by `saved_config` alone: it may be of another version.

    A fact is written by `manifest_of`, or by `facts_of` where it is the same at every step; a further one has a line in
    NOT_WRITTEN_BEFORE as well. `checkpoint.load` gives the method what it counts, the loop passes what it counts itself
    (`pending_losses`), and `resume.py` refuses what does not fit.
    """

    step: int
    world_size: int
    queue_size: int
    loss_scale: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    images: ImageList | None
    pending_losses: list[float]
    files: dict[str, FileFacts]


_MANIFEST = TypeAdapter(Manifest)
NOT_WRITTEN_BEFORE: dict[str, Any] = {
    "queue_size": 0, "loss_scale": {}, "config": {}, "versions": {}, "images": None, "pending_losses": [], "files": {},
}  # fmt: skip


def facts_of(config: PretrainConfig, images: ImageFolder) -> dict[str, Any]:
    """What checkpoint.json says at every step of a run: settings without secrets, the code, the list of images."""
    kept = without_secrets(config).model_dump(mode="json")
    return {"config": kept, "versions": package_versions(), "git": git_state(), "images": listed(images)}


def manifest_of(method: Method, facts: dict[str, Any], world: World) -> dict[str, Any]:
    """What checkpoint.json says of `method` at its step; the names of the files are added when they are written.

    Args:
        method: what is saved.
        facts: `facts_of`, and the log's `pending_losses`.
        world: this process.
    """
    return {
        "step": method.step,
        "world_size": world.world_size,
        "queue_size": method.queue.size if method.queue else 0,
        "loss_scale": method.engine.scaler.state_dict(),
        **facts,
    }


def read_manifest(folder: Path) -> Manifest:
    """checkpoint.json of a complete checkpoint; what an older version did not write is filled in.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        content = parsed_json((folder / MANIFEST).read_bytes())
        return _MANIFEST.validate_python({**NOT_WRITTEN_BEFORE, **content})
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from error
    except ValidationError as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {first_problem(error)}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from error


def first_problem(error: ValidationError) -> str:
    """What is wrong with a file of JSON, by its first entry that is not as it was written."""
    problem = error.errors()[0]
    name = ".".join(map(str, problem["loc"]))
    return f"{name}: {problem['msg'].lower()}" if name else problem["msg"].lower()


def saved_config(folder: Path) -> PretrainConfig:
    """The settings that a checkpoint was made with; a setting that its version did not have has its default.

    Before there was a shuffle.block_size, keys were shuffled over the whole batch.

    Raises:
        UserError: they are those of another version, which has other settings; the version and the settings are named.
    """
    manifest = read_manifest(folder)
    try:
        config = PretrainConfig.model_validate(manifest["config"])
        if "block_size" in manifest["config"].get("shuffle", {}):
            return config
        whole = config.shuffle.model_copy(update={"block_size": config.optim.global_batch_size})
        return config.model_copy(update={"shuffle": whole})
    except ValidationError as error:
        its, ours = manifest["versions"].get("moco_dist", "unknown"), __version__
        found = "; ".join(mistakes(error, PretrainConfig))
        raise UserError(f"{folder} was written by moco_dist {its} with settings that moco_dist {ours} does not take "
                        f"({found}); go on with that version, or give another --run.dir") from error  # fmt: skip


def without_secrets(config: PretrainConfig) -> PretrainConfig:
    """The config as files may hold it: a user and password in tracking.uri are left out."""
    uri = config.tracking.uri
    tracking = config.tracking.model_copy(update={"uri": without_credentials(uri) if uri else uri})
    return config.model_copy(update={"tracking": tracking})
