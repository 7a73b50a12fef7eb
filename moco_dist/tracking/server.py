"""Where MLflow is, and what a run's folder says about it."""

import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from moco_dist.config.credentials import without_credentials
from moco_dist.config.run import TrackingConfig
from moco_dist.config.section import path_of
from moco_dist.errors import UserError, nearest
from moco_dist.files import parsed_json
from moco_dist.tracking.database import SQLITE, file_of, has_run, open_alone
from moco_dist.tracking.failure import reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
# Set where the user has not, before mlflow is imported: no telemetry, no log lines (failures are exceptions, told
# here without credentials), and a dead server is noticed within half a minute instead of several.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
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
    return run_page(saved["tracking_uri"], saved["experiment_id"], saved["run_id"])


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    """A run's page on a server. MLflow 3.17 shows a new visitor what is for language models, unless the link says."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def default_uri(run_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, else sqlite in the folder above the run's."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{run_dir.resolve().parent / 'mlflow.db'}"


def absolute(uri: str) -> str:
    """A sqlite URI with its whole path, in which `~` at the start is the home folder; any other as it is.

    Raises:
        UserError: the path has a `$VARIABLE` that no shell has replaced.
    """
    return f"{SQLITE}{path_of(uri.removeprefix(SQLITE)).resolve()}" if uri.startswith(SQLITE) else uri


def require_usable(uri: str, given_by: str = "tracking.uri") -> None:
    """Refuse what never works: a misspelt scheme, or a cut token. Whether a server answers is seen later.

    Args:
        uri: of a server or a database.
        given_by: the setting or variable that it comes from.

    Raises:
        UserError: its scheme is none of SCHEMES, or what MLflow sends to say who is asking has a line break.
    """
    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else uri
    if scheme not in SCHEMES or ("://" not in uri and scheme != "databricks"):
        what = "is neither a server nor a database"
        if scheme == "file" or (":" not in uri and Path(uri).is_dir()):
            folder = Path(uri.removeprefix("file:").removeprefix("//"))
            database = f"{SQLITE}{folder.absolute()}/mlflow.db"
            what = f"is a folder of files, which MLflow no longer writes; {database} is a database there"
        raise UserError(
            f"{given_by} {without_credentials(uri)} {what}; what a run can be told to begins with "
            f"{', '.join(f'{name}://' for name in SCHEMES)}{nearest(scheme, SCHEMES)}; or go on without it: "
            "--tracking.backend none"
        )
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        if uri.startswith("http") and any(ord(letter) < 32 for letter in os.environ.get(name, "")):
            raise UserError(f"{name} has a line break or another control character, which no server takes; was it read "
                            "from a file with its last line break?")  # fmt: skip


def experiment_of(config: TrackingConfig) -> str:
    """The experiment's name: the setting, else MLFLOW_EXPERIMENT_NAME, else the setting's default."""
    given = "experiment" in config.model_fields_set
    return config.experiment if given else os.environ.get("MLFLOW_EXPERIMENT_NAME") or config.experiment


def ignored_variables() -> list[str]:
    """A line for each variable that tells MLflow something and that this program does not follow."""
    said = {
        "MLFLOW_EXPERIMENT_ID": "name the experiment by --tracking.experiment or MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_RUN_ID": "a run's folder says which MLflow run it is",
        "MLFLOW_RUN_NAME": "a run is called as its folder, the last part of --run.dir",
    }
    return [f"{name} is not used: {why}" for name, why in said.items() if os.environ.get(name)]


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
    path = file_of(uri)
    if path is None:
        return MlflowClient(uri)
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")  # no connection to a file that was set aside
    return open_alone(path, lambda: MlflowClient(uri))


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
        text = f"warning: MLflow at {without_credentials(uri)}: {reason(error, uri)}; going on without it"
        tqdm.write(text, file=sys.stderr)
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
        saved = parsed_json(path.read_text(encoding="utf-8"))
        known = {name: str(saved[name]) for name in ("tracking_uri", "experiment_id", "run_id")}
        return {**known, "folder": saved.get("folder", ""), "sent_bytes": str(int(saved.get("sent_bytes", 0)))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove it, and the run is tracked as a new one") from error


def uri_of(run_dir: Path, saved: dict[str, str]) -> str:
    """The saved URI: with the environment's credentials if it is the same one, or where its database is now.

    A database that was moved or copied together with its runs lies above them.
    """
    uri, given = saved["tracking_uri"], os.environ.get("MLFLOW_TRACKING_URI", "")
    if given and without_credentials(absolute(given)) == uri:
        return given
    beside, own = run_dir.resolve().parent / "mlflow.db", file_of(uri)
    if own is not None and beside.is_file() and (not own.is_file() or has_run(beside, saved["run_id"])):
        return f"{SQLITE}{beside}"
    return uri


def original_of(run_dir: Path, saved: dict[str, str], uri: str) -> Path | None:
    """The folder of the run that `run_dir` was copied from, where it still is and the copy has no database of its own.

    Args:
        run_dir: folder of a run.
        saved: its `read_saved`.
        uri: where the run of `run_dir` is to be told.
    """
    original, here = Path(saved["folder"]), run_dir.resolve()
    if not saved["folder"] or not saved["run_id"] or original == here:
        return None
    other, database = read_saved(record_path(original)), file_of(uri)
    if other is None or other["run_id"] != saved["run_id"] or original.samefile(here):  # or one folder, mounted twice
        return None
    theirs = file_of(uri_of(original, other))
    is_own = database is not None and database.parent == here.parent and has_run(database, saved["run_id"])
    return None if is_own and database != theirs else original  # or a copy that lies beside it
