"""One run on an MLflow server: found or made, then told the records of a journal."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_dist.config.credentials import without_credentials
from moco_dist.files import write_whole
from moco_dist.tracking.failure import reason
from moco_dist.tracking.server import client_of, read_saved

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DESCRIPTION = "mlflow.note.content"  # in Markdown
KEY_TAG = "moco_dist.key"  # a run or model that was made just before a crash is found by it, and not made twice
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # or its page asks what it is
NO_MODELS = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED")  # a server from before MLflow 3


class Refused(Exception):
    """MLflow will never take this record."""


class RemoteRun:
    """The MLflow run of one journal; `file` (RUN/mlflow.json for the pre-training's) says which it is.

    Attributes:
        uri: of the server; it may have a password.
        sent_bytes: how much of the journal the server has.
    """

    def __init__(self, file: Path, uri: str, parent_file: Path | None = None, watches_system: bool = False) -> None:
        self._file, self.uri, self._parent_file = file, uri, parent_file
        self._watches_system = watches_system
        saved = read_saved(file)
        self._run_id = saved["run_id"] if saved else ""
        self._experiment_id = saved["experiment_id"] if saved else ""
        self.sent_bytes = int(saved["sent_bytes"]) if saved else 0
        self._client: MlflowClient | None = None
        self._monitor: Any = None

    def save(self) -> None:
        """Write `file`."""
        saved = {
            "tracking_uri": without_credentials(self.uri),
            "experiment_id": self._experiment_id,
            "run_id": self._run_id,
            "folder": str(self._file.parent.resolve()),  # a copy of the run can tell that it is one
            "sent_bytes": self.sent_bytes,
        }
        write_whole(self._file, f"{json.dumps(saved, indent=2)}\n".encode())

    def mark_sent(self, sent_bytes: int) -> None:
        """The server has the journal up to there."""
        self.sent_bytes = sent_bytes
        with contextlib.suppress(OSError):  # a full disk; if this process ends now, some is sent again
            self.save()

    def connect(self, begin: dict[str, Any]) -> None:
        """Find the run, or make it, once a process.

        A run that this server does not have, or that was deleted, begins anew with all of the journal.

        Args:
            begin: the journal's first record.
        """
        if self._client is not None:
            return
        client = client_of(self.uri)
        if self._run_id and not begin.get("in_parent") and _find(client, self._run_id) is None:
            self._run_id, self.sent_bytes = "", 0
        if not self._run_id:
            self._make(client, begin)
            self.save()
        self._client = client

    def _make(self, client: "MlflowClient", begin: dict[str, Any]) -> None:
        from mlflow.entities import Param

        tags = {**begin["tags"], KEY_TAG: begin["key"]}
        if self._parent_file is not None:
            parent = read_saved(self._parent_file)
            if parent is None or not parent["run_id"]:
                raise RuntimeError("it does not have the pre-training's run yet")
            self._experiment_id, tags["mlflow.parentRunId"] = parent["experiment_id"], parent["run_id"]
            if begin.get("in_parent"):
                self._run_id = parent["run_id"]
                return
        else:
            self._experiment_id = _experiment(client, begin["experiment"], begin["artifacts"])
        same = client.search_runs([self._experiment_id], f"tags.`{KEY_TAG}` = '{begin['key']}'", max_results=1)
        run = same[0] if same else client.create_run(self._experiment_id, begin.get("time_ms"), tags, begin["name"])
        client.log_batch(run.info.run_id, params=[Param(*item) for item in begin["params"].items()])
        self._run_id = run.info.run_id

    def deliver(self, records: list[dict[str, Any]]) -> None:
        """Tell the run these records, in order; those that are metrics in one call.

        Raises:
            Refused: one of them is of no use to MLflow.
            Exception: of mlflow, requests or SQLAlchemy: try again later.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        client = self._client
        assert client is not None  # connect
        metrics: list[Metric] = []
        try:
            for record in records:
                if "metrics" in record and "to_parent" not in record:
                    step, time_ms = record["step"], record["time_ms"]
                    metrics += [Metric(name, value, time_ms, step) for name, value in record["metrics"].items()]
                    continue
                if metrics:
                    client.log_batch(self._run_id, metrics=metrics)
                    metrics = []
                self._tell(client, record)
            if metrics:
                client.log_batch(self._run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise Refused(reason(error)) from error
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self._client = None  # the run is gone: `connect` makes it anew
            raise
        if self._watches_system:
            self._watch_system()

    def _tell(self, client: "MlflowClient", record: dict[str, Any]) -> None:
        if "to_parent" in record and self._parent_file is not None:
            self._tell_parent(client, record)
            return
        for name, value in record.get("set_tags", {}).items():
            client.set_tag(self._run_id, name, value)
        if "describe" in record:
            _describe(client, self._run_id, record["describe"])
        if "dataset" in record:
            _log_dataset(client, self._run_id, record["dataset"])
        if "artifact" in record and os.path.exists(record["artifact"]):
            client.log_artifact(self._run_id, record["artifact"], record["folder"] or None)
        if "model" in record and os.path.exists(record["model"]["file"]):
            self._log_model(client, record["model"])
        if record.get("status") == "RUNNING":
            client.update_run(self._run_id, status="RUNNING")
        elif "status" in record:
            client.set_terminated(self._run_id, record["status"], record["time_ms"])

    def _tell_parent(self, client: "MlflowClient", record: dict[str, Any]) -> None:
        """An accuracy on the pre-training's own run: MLflow sorts and draws runs by their own metrics alone."""
        from mlflow.entities import Metric

        saved = read_saved(self._parent_file) if self._parent_file else None
        if saved is None or not saved["run_id"]:
            return
        step, time_ms = record["step"], record["time_ms"]
        metrics = [Metric(name, value, time_ms, step) for name, value in record["metrics"].items()]
        client.log_batch(saved["run_id"], metrics=metrics)
        _describe(client, saved["run_id"], record.get("describe", {}))  # a journal of an earlier version has none

    def _log_model(self, client: "MlflowClient", model: dict[str, Any]) -> None:
        """A file of weights as a logged model of the run; as an artifact where the server knows no such models."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException

        key = f"{self._run_id} {model['step']}"
        try:
            same = client.search_logged_models([self._experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
            logged = same[0] if same else client.create_logged_model(
                self._experiment_id, model["name"], self._run_id, {KEY_TAG: key}, model["params"], model["kind"]
            )  # fmt: skip
        except MlflowException as error:
            if error.error_code not in NO_MODELS:
                raise
            client.log_artifact(self._run_id, model["file"], model["name"])
            return
        client.log_model_artifact(logged.model_id, model["file"])
        client.finalize_logged_model(logged.model_id, "READY")
        outputs = client.get_run(self._run_id).outputs
        if logged.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            client.log_outputs(self._run_id, [LoggedModelOutput(logged.model_id, model["step"])])  # refused if there

    def _watch_system(self) -> None:
        """CPU, memory, disk, network and, with nvidia-ml-py installed, GPU, every 30 s; nothing without psutil.

        MLflow's monitor ends when a server fails; then a new one is started.
        """
        if self._monitor is not None and self._monitor._process is not None and self._monitor._process.is_alive():
            return
        with contextlib.suppress(ImportError):
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                self._run_id,
                sampling_interval=10,
                samples_before_logging=3,
                resume_logging=True,
                tracking_uri=self.uri,
            )
            self._monitor.start()

    def close(self) -> None:
        """End the monitor."""
        self._watches_system = False
        if self._monitor is not None:
            self._monitor.finish()


def with_lines(description: str, lines: dict[str, str]) -> str:
    """A description in Markdown with `- name: text` for each of `lines`: in the place of an older one, or at its end.

    Whatever else is in it stays, also what a person has written on MLflow's page.
    """
    for name, text in lines.items():
        line = f"- {name}: {text}"
        old = re.search(rf"^- {re.escape(name)}: .*$", description, re.MULTILINE)
        if old:
            description = description[: old.start()] + line + description[old.end() :]
        else:
            is_list = description.rstrip().rpartition("\n")[2].startswith("- ")
            description = f"{description.rstrip()}\n{'' if is_list else chr(10)}{line}"
    return description


def _describe(client: "MlflowClient", run_id: str, lines: dict[str, str]) -> None:
    before = client.get_run(run_id).data.tags.get(DESCRIPTION, "")
    if (after := with_lines(before, lines)) != before:
        client.set_tag(run_id, DESCRIPTION, after)


def _log_dataset(client: "MlflowClient", run_id: str, dataset: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    known = Dataset(
        dataset["name"], dataset["digest"], "local", json.dumps({"uri": dataset["root"]}),
        profile=json.dumps(dataset["profile"]),
    )  # fmt: skip
    client.log_inputs(run_id, [DatasetInput(known, [InputTag("mlflow.data.context", "training")])])


def _find(client: "MlflowClient", run_id: str) -> "Run | None":
    """Look for the run; None if this server does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """Its id; made if it is not there."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # another run may have made it just now
            client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
        experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage == "deleted":
        raise RuntimeError(
            f"experiment {name!r} cannot be created, or was deleted: restore it there, or start with another "
            "--tracking.experiment and folder"
        )
    return experiment.experiment_id
