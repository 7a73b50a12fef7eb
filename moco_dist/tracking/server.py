"""Where MLflow is, and what a run's folder says about it."""

import json
import logging
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from moco_dist.errors import UserError, nearest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SQLITE = "sqlite:///"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
# Set where the user has not, before mlflow is imported: no telemetry, no log lines (failures are exceptions, told
# here without credentials), and a dead server is noticed within half a minute instead of several.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def ui_command(run_dir: Path) -> str:
    """The shell command that opens the run in MLflow: its web server for a database, else the server's page."""
    saved = read_saved(record_path(run_dir))
    if saved is None:
        return "not tracked (--tracking.backend none)"
    if not saved["run_id"]:
        return f"the server does not have it yet: moco-dist sync {shlex.quote(str(run_dir))}"
    uri = uri_of(run_dir, saved)
    if uri.startswith("http"):
        return f"python -m webbrowser {shlex.quote(page_of(run_dir))}"
    beside_python = os.path.relpath(Path(sys.executable).with_name("mlflow"))
    mlflow = "mlflow" if shutil.which("mlflow") else beside_python  # of a virtual environment that is not activated
    return f"{shlex.quote(mlflow)} ui --backend-store-uri {shlex.quote(without_credentials(uri))}"


def page_of(run_dir: Path) -> str:
    """The run's page on its MLflow server; "" where it has none."""
    saved = read_saved(record_path(run_dir))
    if saved is None or not saved["run_id"] or not saved["tracking_uri"].startswith("http"):
        return ""
    return f"{saved['tracking_uri'].rstrip('/')}/#/experiments/{saved['experiment_id']}/runs/{saved['run_id']}"


def without_credentials(text: str) -> str:
    """`text`, a URI or a message with URIs in it, without `user:password@` and `password=...`."""
    # A password may have a slash in it (SQLAlchemy takes it); what follows a port is a path.
    text = re.sub(r"(?<=://)(?:[^/\s]*@|[^/\s:]*:(?!\d+/)[^\s@]*@)", "", text)
    return re.sub(r"(?<=[?&]password=)[^&\s]*", "", text)


def default_uri(run_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, else sqlite in the folder above the run's."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{run_dir.resolve().parent / 'mlflow.db'}"


def absolute(uri: str) -> str:
    """A sqlite URI with its whole path; any other as it is."""
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}" if uri.startswith(SQLITE) else uri


def require_known_scheme(uri: str) -> None:
    """Whether there is a server at an address, time tells; but a misspelt scheme never works.

    Raises:
        UserError: it is none of SCHEMES.
    """
    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else uri
    if scheme not in SCHEMES or ("://" not in uri and scheme != "databricks"):
        raise UserError(
            f"tracking.uri {without_credentials(uri)} is not one that MLflow knows: it begins with "
            f"{', '.join(f'{name}://' for name in SCHEMES)}{nearest(scheme, SCHEMES)}; or go on without it: "
            "--tracking.backend none"
        )


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


def saved_run(run_dir: Path) -> "tuple[MlflowClient, str, Run] | None":
    """Client, URI and run of the pre-training in `run_dir`; None where it was not tracked, or with a warning."""
    saved = read_saved(record_path(run_dir))
    if saved is None:
        return None
    uri = uri_of(run_dir, saved)
    try:
        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
            raise FileNotFoundError("the database is gone")
        client = client_of(uri)
        return client, uri, client.get_run(saved["run_id"])
    except Exception as error:  # mlflow, SQLAlchemy and requests each have their own
        text = f"warning: MLflow at {uri}: {str(error).splitlines()[0]}; going on without it"
        tqdm.write(without_credentials(text), file=sys.stderr)
        return None


def record_path(run_dir: Path) -> Path:
    """RUN/mlflow.json: which MLflow run is the pre-training's, and how much of its journal was sent."""
    return run_dir / "mlflow.json"


def journal_path(run_dir: Path, name: str) -> Path:
    """RUN/mlflow/NAME: the journal of a pre-training or of an evaluation."""
    return run_dir / "mlflow" / name


def read_saved(path: Path) -> dict[str, str] | None:
    """RUN/mlflow.json, or that of an evaluation; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        known = {name: str(saved[name]) for name in ("tracking_uri", "experiment_id", "run_id")}
        return {**known, "sent_bytes": str(int(saved.get("sent_bytes", 0)))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove it, and the run is tracked as a new one") from error


def uri_of(run_dir: Path, saved: dict[str, str]) -> str:
    """The saved URI: with the environment's credentials if it is the same one, or where its database moved to."""
    uri, given = saved["tracking_uri"], os.environ.get("MLFLOW_TRACKING_URI", "")
    if given and without_credentials(absolute(given)) == uri:
        return given
    beside = run_dir.resolve().parent / "mlflow.db"
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file() and beside.is_file():
        return f"{SQLITE}{beside}"
    return uri
