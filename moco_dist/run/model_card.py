"""What is known of a run's backbone, for whoever is handed it: a model card in Markdown."""

from collections.abc import Sequence
from pathlib import Path

from moco_dist.config.credentials import without_credentials
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.plan import plan_of
from moco_dist.provenance import __version__
from moco_dist.run import checkpoint
from moco_dist.run.manifest import read_manifest
from moco_dist.run.results import read_results
from moco_dist.run.weights import imported_from

EVALUATIONS = {"knn": "kNN", "linear": "linear evaluation", "finetune": "fine-tuning"}


def model_card(run_dir: Path, config: PretrainConfig, step: int, loads: Sequence[str] = ()) -> str:
    """The backbone's network, input, data, recipe, measured accuracies and limits; what is not known is said.

    Folders and servers stay out of it: it goes where nobody knows them.

    Args:
        run_dir: RUN.
        config: settings of the run.
        step: optimiser steps behind the backbone; 0 for an imported one.
        loads: lines of Python that load it, if it lies beside the card.
    """
    augment, size = config.augment, config.data.image_size
    return "\n".join([
        f"# {run_dir.resolve().name}: {config.model.arch} backbone, trained without labels",
        "",
        f"Input: float32 (N, 3, {size}, {size}), RGB in [0, 1], less mean {list(augment.mean)},",
        f"divided by std {list(augment.std)}. The evaluations resize an image's short side to",
        f"{round(size * 8 / 7)} pixels, bilinear with antialiasing, and take the centre.",
        "Output: features, before the projection head.",
        "",
        *(["## Loading", "```python", *loads, "```", ""] if loads else []),
        *_training(run_dir, config, step),
        "",
        "## Numbers",
        *(_numbers(run_dir) or ["- not evaluated"]),
        "",
        "Measured by moco_dist on labelled validation images, by default those that lie beside the training images.",
        "",
        "## Limits",
        "How the features do on images unlike the training data was not measured. A bias of the images may be one of",
        "the features.",
        "",
        f"Written by moco_dist {__version__}.",
        "",
    ])  # fmt: skip


def _training(run_dir: Path, config: PretrainConfig, step: int) -> list[str]:
    if file := "" if step else imported_from(run_dir):
        return ["## Data and recipe", f"The weights come from a file, `{file}`, of another program. Nothing more is",
                "known here of how they were trained, of their data or of its licence."]  # fmt: skip
    root, model, optim, method = config.data.root, config.model, config.optim, config.of_method
    name = without_credentials(root.name or str(root))
    listed = read_manifest(checkpoint.latest(run_dir))["images"]
    count = f", {listed['count']:,} images" if listed else ""
    done = f"{step / plan_of(config, listed['count']).steps_per_epoch:.4g} of " if listed else ""
    return [
        "## Data",
        f"`{name}`{count}, the images alone. Their licence is theirs, and may limit what can be done with this model.",
        "",
        "## Recipe",
        f"{method.paper}: {method.described()}.",
        *([f"Begun with the weights `{model.init.name}`."] if model.init else []),
        f"{step:,} steps, {done}{optim.epochs} planned epochs, batch {optim.global_batch_size},",
        f"{optim.optimizer}, base_lr {optim.base_lr}, seed {config.run.seed}.",
    ]


def _numbers(run_dir: Path) -> list[str]:
    """A line for each accuracy of the trained and the untrained network."""
    lines = []
    for name, result in read_results(run_dir).items():
        kind = EVALUATIONS.get(name.partition("_")[0])
        if kind is None or result["encoder"] not in ("trained", "untrained"):
            continue
        of = "untrained, to compare with"
        if result["encoder"] == "trained":
            of = f"after {result['step']:,} steps" if result["step"] else "as imported"
        some = result["variant"].replace("_", ", ")
        lines += [f"- {kind}{some}, {of}: {key} {value:.2f} % of {result['num_val']:,} images"
                  for key, value in result["accuracy"].items()]  # fmt: skip
    return lines
