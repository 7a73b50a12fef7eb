"""A run's record in MLflow, kept by rank 0: settings, metrics, files, and evaluations as child runs.

Everything goes through MlflowClient on one background thread, in order, so that a training step never waits for a
server. A server that cannot be reached when a pre-training starts is an error; later it is a warning, since every
number is in log.jsonl too.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from tqdm import tqdm

from moco_dist.config import EvalConfig, PretrainConfig
from moco_dist.config_source import flatten
from moco_dist.distributed.world import World
from moco_dist.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SQLITE = "sqlite:///"
FINISH_SECONDS = 30  # the longest wait at the end for metrics still on their way
# Set where the user has not, before mlflow is imported: no telemetry, no log lines (failures are exceptions, told
# here without credentials), and a dead server is noticed within half a minute instead of several.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Tracker:
    """One MLflow run; without a client, a tracker that does nothing.

    A context manager: leaving it ends the run as FINISHED, as KILLED after Ctrl-C or SIGTERM, as FAILED after any
    other error.
    """

    def __init__(
        self, client: "MlflowClient | None" = None, run_id: str = "", uri: str = "", ends_run: bool = True
    ) -> None:
        self._client, self._run_id, self._uri, self._ends_run = client, run_id, uri, ends_run
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self._last: Future[None] | None = None
        self._is_failing = False
        self._monitor: Any = None

    @classmethod
    def for_pretraining(cls, config: PretrainConfig, world: World) -> "Tracker":
        """The run of a pre-training: the one that RUN/mlflow.json names, if the server has it; else a new one.

        Args:
            config: its settings are the run's parameters; `tracking` says where.
            world: this process; only rank 0 tracks.

        Raises:
            UserError: mlflow is not installed, or the server cannot be used.
        """
        if not world.is_main or config.tracking.backend == "none":
            return cls()
        run_dir = config.run.dir
        uri = _absolute(config.tracking.uri or _default_uri(run_dir))
        try:
            client = client_of(uri)
            run = _resumed_run(client, run_dir) or _new_run(client, config, uri)
            tags = {f"version.{name}": version for name, version in package_versions().items()}
            tags |= {"world_size": str(world.world_size), "num_nodes": str(world.num_nodes), "device": world.device}
            for name, value in tags.items():
                client.set_tag(run.info.run_id, name, value)
            client.update_run(run.info.run_id, status="RUNNING")
        except UserError:
            raise
        except Exception as error:  # mlflow, SQLAlchemy and requests each have their own
            raise UserError(
                f"MLflow at {without_credentials(uri)} cannot be used: {_reason(error)}; check --tracking.uri and "
                "MLFLOW_TRACKING_URI, or go on without it: --tracking.backend none"
            ) from error
        _write_saved(run_dir, uri, run)
        tracker = cls(client, run.info.run_id, uri)
        tracker._start_system_metrics()
        return tracker

    @classmethod
    def for_evaluation(cls, config: EvalConfig, command: str, encoder: str) -> "Tracker":
        """A new child of the pre-training's run; does nothing where that was not tracked.

        Args:
            config: its settings are the child's parameters; `run_dir` is the folder of the pre-training.
            command: `knn` or `linear`.
            encoder: what gave the features.
        """
        found = None if config.tracking == "none" else saved_run(config.run_dir)
        if found is None:
            return cls()
        client, uri, parent = found
        tracker = cls(client, uri=uri)
        with tracker._warning():
            tags = {"mlflow.parentRunId": parent.info.run_id, "evaluation": command, "encoder": encoder}
            run = client.create_run(parent.info.experiment_id, tags=tags, run_name=f"{command} {encoder}")
            tracker._run_id = run.info.run_id
            client.log_batch(run.info.run_id, params=_params(config))
            return tracker
        return cls()

    @classmethod
    def reopen(cls, run_dir: Path) -> "Tracker":
        """The run of the pre-training in `run_dir`, to add to it; its status stays as it is."""
        found = saved_run(run_dir)
        if found is None:
            return cls()
        client, uri, run = found
        return cls(client, run.info.run_id, uri, ends_run=False)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        was_stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish("FINISHED" if kind is None else "KILLED" if was_stopped else "FAILED")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send numbers of an optimiser step; returns at once."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._send(
            self._client.log_batch, [Metric(name, float(value), now, step) for name, value in metrics.items()]
        )

    def log_artifact(self, path: Path, folder: str) -> None:
        """Send a copy of a file into `folder` of the run's artifacts; returns at once."""
        if self._client is not None:
            self._send(self._client.log_artifact, str(path), folder)

    def finish(self, status: str) -> None:
        """Wait for what is on its way, at most FINISH_SECONDS, and end the run.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        client, self._client = self._client, None
        if client is None:
            return
        if self._last is not None:
            wait([self._last], FINISH_SECONDS)
        self._sender.shutdown(cancel_futures=True)
        if self._monitor is not None and not self._is_failing:
            self._monitor.finish()
        if self._ends_run:
            self._attempt(client.set_terminated, status)

    def _send(self, call: Callable[..., Any], *args: Any) -> None:
        self._last = self._sender.submit(self._attempt, call, *args)  # one thread: done in this order

    def _attempt(self, call: Callable[..., Any], *args: Any) -> None:
        with self._warning():
            call(self._run_id, *args)
            self._is_failing = False

    @contextlib.contextmanager
    def _warning(self):
        """A failure inside is told once per outage, and nothing else happens."""
        try:
            yield
        except Exception as error:
            if not self._is_failing:
                _say(f"{_reason(error)}; going on without it", self._uri)
            self._is_failing = True

    def _start_system_metrics(self) -> None:
        """CPU, memory, disk, network and, with nvidia-ml-py installed, GPU, every 30 s; nothing without psutil."""
        with contextlib.suppress(ImportError):
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                self._run_id, sampling_interval=10, samples_before_logging=3, resume_logging=True,
                tracking_uri=self._uri,
            )
            self._monitor.start()


def page_of(run_dir: Path) -> str:
    """The run's page on its MLflow server; "" where it has none."""
    saved = _read_saved(run_dir)
    if saved is None or not saved["tracking_uri"].startswith("http"):
        return ""
    return f"{saved['tracking_uri'].rstrip('/')}/#/experiments/{saved['experiment_id']}/runs/{saved['run_id']}"


def ui_command(run_dir: Path) -> str:
    """The shell command that opens the run in MLflow: its web server for a database, else the server's page."""
    saved = _read_saved(run_dir)
    if saved is None:
        return "not tracked (--tracking.backend none)"
    uri = _uri_of(run_dir, saved)
    if uri.startswith("http"):
        return f"python -m webbrowser {shlex.quote(page_of(run_dir))}"
    return f"mlflow ui --backend-store-uri {shlex.quote(without_credentials(uri))}"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, as installed here."""
    packages = {name: metadata.version(name) for name in ("moco_dist", "torch", "torchvision", "numpy", "pillow")}
    return {"python": ".".join(map(str, sys.version_info[:3])), **packages}


def without_credentials(text: str) -> str:
    """`text`, a URI or a message with URIs in it, without `user:password@` and `password=...`."""
    text = re.sub(r"(?<=://)[^/\s]*@", "", text)
    return re.sub(r"(?<=[?&]password=)[^&\s]*", "", text)


def _default_uri(run_dir: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{run_dir.resolve().parent / 'mlflow.db'}"


def _absolute(uri: str) -> str:
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}" if uri.startswith(SQLITE) else uri


def client_of(uri: str) -> "MlflowClient":
    """An MLflow client that does not talk.

    Raises:
        UserError: mlflow is not installed.
    """
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise UserError(
            "mlflow is not installed; pip install mlflow, or go on without it: --tracking.backend none"
        ) from error
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())  # if it was imported before
    return MlflowClient(uri)


def _new_run(client: "MlflowClient", config: PretrainConfig, uri: str) -> "Run":
    from mlflow.exceptions import MlflowException

    name, run_dir = config.tracking.experiment, config.run.dir.resolve()
    # A server keeps artifacts itself; with a bare database they would land in the working directory.
    artifacts = None if uri.startswith(("http", "databricks")) else (run_dir.parent / "mlflow-artifacts").as_uri()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # another run may have made it just now
            client.create_experiment(name, artifact_location=artifacts)
        experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment {name!r} cannot be created, or was deleted; give another --tracking.experiment"
        )
    run = client.create_run(experiment.experiment_id, run_name=run_dir.name)
    client.log_batch(run.info.run_id, params=_params(config))
    return run


def _resumed_run(client: "MlflowClient", run_dir: Path) -> "Run | None":
    """The run that mlflow.json names, if this server has it."""
    from mlflow.exceptions import MlflowException

    saved = _read_saved(run_dir)
    if saved is None:
        return None
    try:
        run = client.get_run(saved["run_id"])
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run


def saved_run(run_dir: Path) -> "tuple[MlflowClient, str, Run] | None":
    """Client, URI and run of the pre-training in `run_dir`; None where it was not tracked, or with a warning."""
    saved = _read_saved(run_dir)
    if saved is None:
        return None
    uri = _uri_of(run_dir, saved)
    try:
        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
            raise FileNotFoundError("the database is gone")
        client = client_of(uri)
        return client, uri, client.get_run(saved["run_id"])
    except Exception as error:
        _say(f"{_reason(error)}; going on without it", uri)
        return None


def _read_saved(run_dir: Path) -> dict[str, str] | None:
    path = run_dir / "mlflow.json"
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(saved[name]) for name in ("tracking_uri", "experiment_id", "run_id")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove it, and the run is tracked as a new one") from error


def _write_saved(run_dir: Path, uri: str, run: "Run") -> None:
    saved = {
        "tracking_uri": without_credentials(uri),
        "experiment_id": run.info.experiment_id,
        "run_id": run.info.run_id,
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "mlflow.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def _uri_of(run_dir: Path, saved: dict[str, str]) -> str:
    """The saved URI: with the environment's credentials if it is the same one, or where its database moved to."""
    uri, given = saved["tracking_uri"], os.environ.get("MLFLOW_TRACKING_URI", "")
    if given and without_credentials(_absolute(given)) == uri:
        return given
    beside = run_dir.resolve().parent / "mlflow.db"
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file() and beside.is_file():
        return f"{SQLITE}{beside}"
    return uri


def _params(config: BaseModel) -> list[Any]:
    from mlflow.entities import Param

    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flatten(config).items()}
    return [Param(name, without_credentials(text)) for name, text in texts.items()]


def _reason(error: Exception) -> str:
    """What went wrong, in a few words and without credentials."""
    text = without_credentials(str(error))
    if "Max retries exceeded" in text or "timeout exception" in text:
        return "it does not answer"
    return re.split(r"\.\s|\n", text, maxsplit=1)[0][:200] or type(error).__name__


def _say(text: str, uri: str) -> None:
    tqdm.write(f"warning: MLflow at {without_credentials(uri)}: {text}", file=sys.stderr)
