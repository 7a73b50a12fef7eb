"""The APIs' own schemas, without a cluster: of `kubernetes-validate`, and for Trainer of `kubeflow-trainer-api`."""

import functools
from typing import Any

import jsonschema
import kubeflow_trainer_api.models as trainer
import kubernetes_validate

KUBERNETES = "1.34"
MODELS = {
    "TrainJob": trainer.TrainerV1alpha1TrainJob,
    "TrainingRuntime": trainer.TrainerV1alpha1TrainingRuntime,
}


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object; unknown fields are wrong."""
    if document["kind"] in MODELS:
        validator = jsonschema.Draft202012Validator(_schema(document["kind"]))
        errors = [leaf for error in validator.iter_errors(document) for leaf in _leaves(error)]
        return [f"{error.json_path}: {error.message[:300]}" for error in errors]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
    return []


def _leaves(error: jsonschema.ValidationError) -> list[jsonschema.ValidationError]:
    """What is wrong inside the alternatives of a schema, in place of that none of them fits."""
    inner = [leaf for child in error.context for leaf in _leaves(child)]
    return [leaf for leaf in inner if leaf.validator != "type" or "null" not in leaf.message] or [error]


@functools.cache
def _schema(kind: str) -> dict[str, Any]:
    """The model's schema, closed: as generated, it lets unknown fields pass."""
    schema = MODELS[kind].model_json_schema(by_alias=True)
    _close(schema)
    return schema


def _close(node: Any) -> None:
    if isinstance(node, list):
        for item in node:
            _close(item)
    if isinstance(node, dict):
        if node.get("type") == "object" and "properties" in node:
            node["additionalProperties"] = False
        if node.get("title", "").startswith(("IoK8sApimachineryPkgUtilIntstr", "IoK8sApimachineryPkgApiResource")):
            node.clear()  # a number or a text: the generator has no model for that
        for value in node.values():
            _close(value)
