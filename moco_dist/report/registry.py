"""A run's backbone in MLflow's model registry, with a signature and a model card.

The model is saved as an exported program (torch.export's pt2), which loads without running pickled code.
"""

import inspect
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moco_dist.errors import UserError
from moco_dist.report.compare import RunRecord
from moco_dist.run.model_card import model_card
from moco_dist.run.weights import trained_encoder
from moco_dist.tracking import saved_run

ACCURACIES = ("linear_top1", "knn_top1_k20")


def best_run(records: list[RunRecord]) -> int:
    """The number of the run whose linear evaluation is best; by kNN where no run has one.

    Raises:
        UserError: none was evaluated.
    """
    for name in ACCURACIES:
        rated = [i for i, record in enumerate(records) if name in record.accuracy]
        if rated:
            return max(rated, key=lambda i: records[i].accuracy[name])
    raise UserError("none of the runs was evaluated; moco-dist linear or moco-dist knn comes first")


def register(run_dir: Path, name: str) -> str:
    """A new version of model `name`: the backbone of the run in `run_dir`; returns the version.

    Raises:
        UserError: the run was not tracked by MLflow.
    """
    found = saved_run(run_dir)
    if found is None:
        raise UserError(f"{run_dir} was not tracked by MLflow, so its backbone cannot be registered there")
    client, uri, run = found
    import mlflow
    import mlflow.pytorch
    from mlflow.models import infer_signature

    encoder, config, step = trained_encoder(run_dir)
    packages = ["torch", "torchvision"] + ["timm"] * config.model.arch.startswith("timm:")
    backbone = encoder.backbone.eval()
    example = torch.zeros(2, 3, config.data.image_size, config.data.image_size).numpy()
    with torch.no_grad():
        signature = infer_signature(example, backbone(torch.from_numpy(example)).numpy())
    has_format = "serialization_format" in inspect.signature(mlflow.pytorch.save_model).parameters
    safe: dict[str, Any] = {"serialization_format": "pt2"} if has_format else {"export_model": True}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow warns of its own choices
        folder, card = Path(scratch) / "backbone", model_card(run_dir, config, step)
        mlflow.pytorch.save_model(
            backbone, str(folder), signature=signature, input_example=example,
            pip_requirements=[f"{package}=={metadata.version(package)}" for package in packages],
            metadata={"step": step, "model_card": card}, **safe,
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
        client.log_artifacts(run.info.run_id, str(folder), "backbone")
        mlflow.set_tracking_uri(uri)
        version = mlflow.register_model(f"runs:/{run.info.run_id}/backbone", name)
        client.update_model_version(name, version.version, description=card)
    return str(version.version)
