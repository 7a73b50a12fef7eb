"""What the program tells MLflow, as records of a journal."""

import contextlib
import getpass
import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tqdm import tqdm

from moco_dist.config.credentials import without_credentials
from moco_dist.config.evaluate import DetectConfig, EvalConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import flatten
from moco_dist.distributed.world import World
from moco_dist.errors import Preempted, UserError
from moco_dist.files import read_record, write_whole
from moco_dist.provenance import git_state, package_versions
from moco_dist.tracking.failure import reason
from moco_dist.tracking.outbox import Outbox
from moco_dist.tracking.remote import DESCRIPTION, RemoteRun
from moco_dist.tracking.server import (
    absolute,
    default_uri,
    experiment_of,
    ignored_variables,
    journal_path,
    original_of,
    read_saved,
    record_path,
    require_usable,
    uri_of,
)

PRETRAIN = "pretrain.jsonl"
HEADLINES = ("linear_top1", "knn_top1_k20")  # an evaluation's numbers that the pre-training's run has too
DURING_TRAINING = {"knn_top1": "kNN during training", "probe_top1": "linear probe during training"}


class Tracker:
    """One MLflow run; without an outbox, a tracker that does nothing.

    A context manager: leaving it ends the run as FINISHED, as KILLED after Ctrl-C or when preempted (then with the
    tag `preempted`), as FAILED after any other error. A run that had come to its end, and whose next start is refused,
    stays FINISHED.
    """

    def __init__(self, outbox: Outbox | None = None, run_dir: Path = Path(), ends_run: bool = True) -> None:
        self._outbox, self._run_dir, self._ends_run = outbox, run_dir, ends_run
        self._last_step: dict[str, int] = {}
        self._ended_as = ""  # by an earlier process, as long as this one has told no number
        self._tells_parent = False
        self._after_end: list[dict[str, Any]] = []
        if outbox is not None:
            for record in outbox.records():
                self._remember(record)
            outbox.start()

    @classmethod
    def for_pretraining(cls, config: PretrainConfig, world: World) -> "Tracker":
        """The run of a pre-training: the one that RUN/mlflow.json names, if the server has it; else a new one.

        The server is not waited for. Points that an earlier process has told already are not told again.

        Args:
            config: its settings are the run's parameters; `tracking` says where.
            world: this process; only rank 0 tracks.

        Raises:
            UserError: mlflow is not installed, the URI is of no kind that it knows, or the record is damaged.
        """
        if not world.is_main or config.tracking.backend == "none":
            return cls()
        run_dir = config.run.dir
        uri = absolute(config.tracking.uri or default_uri(run_dir))
        require_usable(uri, "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI")
        _require_mlflow()
        _part_from_original(run_dir, uri)
        watches = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("false", "0")
        remote = RemoteRun(record_path(run_dir), uri, watches_system=watches)
        outbox = Outbox(journal_path(run_dir, PRETRAIN), remote, _say_of(uri))
        remote.save()
        for line in ignored_variables():
            tqdm.write(f"warning: {line}", file=sys.stderr)
        tags = {f"version.{name}": version for name, version in package_versions().items()}
        tags |= {"world_size": str(world.world_size), "num_nodes": str(world.num_nodes), "device": world.device}
        if next(outbox.records(), None) is None:
            # A server keeps artifacts itself; with a bare database they would land in the working directory.
            is_server = uri.startswith(("http", "databricks"))
            artifacts = None if is_server else (run_dir.resolve().parent / "mlflow-artifacts").as_uri()
            name = run_dir.resolve().name
            experiment = experiment_of(config.tracking)
            begin = _begin(name, {DESCRIPTION: _description(config)}, config)
            begin |= {"experiment": experiment, "artifacts": artifacts}
            begin["params"]["tracking.experiment"] = experiment
            outbox.put(begin)
        tags |= _origin()
        outbox.put({"set_tags": {**tags, "preempted": "false"}, "status": "RUNNING"})
        return cls(outbox, run_dir)

    @classmethod
    def for_evaluation(
        cls, config: EvalConfig | DetectConfig, command: str, encoder: str, variant: str = ""
    ) -> "Tracker":
        """A new child of the pre-training's run; does nothing where that was not tracked.

        Args:
            config: its settings are the child's parameters; `run_dir` is the folder of the pre-training.
            command: `knn`, `linear`, `finetune` or `detect`.
            encoder: what gave the features.
            variant: which part of the labels or of the head was used, as in `RunFolder.result`.
        """
        if config.tracking == "none" or config.run_dir is None:
            return cls()
        name = f"{command} {encoder}{variant.replace('_', ' ')}"
        begin = _begin(name, {"evaluation": command, "encoder": encoder}, config)
        tracker = cls._beside(config.run_dir, begin, ends_run=True)
        tracker._tells_parent = encoder == "trained" and not variant
        return tracker

    @classmethod
    def reopen(cls, run_dir: Path) -> "Tracker":
        """The run of the pre-training in `run_dir`, to add to it; its status stays as it is."""
        return cls._beside(run_dir, {"key": secrets.token_hex(8), "in_parent": True, "tags": {}}, ends_run=False)

    @classmethod
    def _beside(cls, run_dir: Path, begin: dict[str, Any], ends_run: bool) -> "Tracker":
        """A journal of its own beside that of the pre-training, which may be running."""
        saved = read_saved(record_path(run_dir))
        if saved is None:
            return cls()
        _require_mlflow()
        uri = uri_of(run_dir, saved)
        if original := original_of(run_dir, saved, uri):
            tqdm.write(f"note: {run_dir} is a copy of {original}, and adds to its MLflow run, at "
                       f"{without_credentials(uri)}", file=sys.stderr)  # fmt: skip
        outbox = _outbox(run_dir, f"{begin['key']}.jsonl", uri)
        outbox.put(begin)
        return cls(outbox, run_dir, ends_run)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if isinstance(error, Preempted) and self._outbox is not None:
            self._outbox.put({"set_tags": {"preempted": "true"}})
        was_stopped = kind is not None and issubclass(kind, KeyboardInterrupt | Preempted)
        is_over = kind is None or (isinstance(error, UserError) and self._ended_as == "FINISHED")
        self.finish("FINISHED" if is_over else "KILLED" if was_stopped else "FAILED")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of an optimiser step; returns at once.

        After a rewind to an older checkpoint, steps are done again; what was told of them is not told twice.
        """
        if self._outbox is None:
            return
        new = {name: float(value) for name, value in metrics.items() if step > self._last_step.get(name, -1)}
        if new:
            record = {"metrics": new, "step": step, "time_ms": _now_ms()}
            self._remember(record)
            self._outbox.put(record)
        above = {name: value for name, value in new.items() if self._tells_parent and name in HEADLINES}
        if above:
            lines = {name: _accuracy(value, step) for name, value in above.items()}
            self._outbox.put(
                {"to_parent": True, "metrics": above, "step": step, "time_ms": _now_ms(), "describe": lines}
            )
        if lines := {DURING_TRAINING[name]: _accuracy(new[name], step) for name in DURING_TRAINING if name in new}:
            self.describe(lines)

    @property
    def is_on(self) -> bool:
        """Whether there is a run that can be told something."""
        return self._outbox is not None

    def describe(self, lines: Mapping[str, str]) -> None:
        """Lines of the run's description in Markdown, by name: a newer one stands in the place of an older one."""
        if self._outbox is not None:
            told = {name: without_credentials(text) for name, text in lines.items()}
            self._outbox.put({"describe": told})

    def log_dataset(self, root: str, list_hash: str, profile: Mapping[str, Any]) -> None:
        """The data set as an input of the run.

        Args:
            root: where it lies.
            list_hash: of its images' paths, in hex digits; MLflow keeps the first 16 as the digest.
            profile: plain values that say more about it.
        """
        if self._outbox is None:
            return
        root = without_credentials(root)
        name = root.rstrip("/").rpartition("/")[2] or root
        self._outbox.put({"dataset": {"name": name, "digest": list_hash[:16], "root": root, "profile": dict(profile)}})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A copy of a file into `folder` of the run's artifacts; returns at once."""
        if self._outbox is not None:
            self._outbox.put({"artifact": str(path.resolve()), "folder": folder})

    def log_model(self, file: Path, name: str, step: int, params: Mapping[str, str], kind: str) -> None:
        """A file of weights as a logged model of the run, without pickle; sent once the run has ended there.

        So a large file on a slow line keeps the run from nothing but the file.

        Args:
            file: the weights.
            name: of the model.
            step: that it was trained to.
            params: plain values that say what it is.
            kind: MLflow's model type.
        """
        model = {"file": str(file.resolve()), "name": name, "step": step, "params": dict(params), "kind": kind}
        self._after_end.append({"model": model})

    def finish(self, status: str) -> None:
        """Wait for what is on its way, at most FINISH_SECONDS, and end the run.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        outbox, self._outbox = self._outbox, None
        if outbox is None:
            return
        if self._ends_run:
            outbox.put({"status": status, "time_ms": _now_ms()})
        for record in self._after_end:
            outbox.put(record)
        if not outbox.finish():
            tqdm.write(f"warning: MLflow does not have all of this; deliver it by: moco-dist sync {self._run_dir}",
                       file=sys.stderr)  # fmt: skip
        elif outbox.path.name != PRETRAIN:
            _remove(outbox.path)

    def _remember(self, record: dict[str, Any]) -> None:
        for name in record.get("metrics", ()):
            self._last_step[name] = max(record["step"], self._last_step.get(name, -1))
            self._ended_as = ""
        if record.get("status", "RUNNING") != "RUNNING":
            self._ended_as = record["status"]


def sync(run_dir: Path) -> tuple[list[str], list[str]]:
    """Deliver what MLflow has not got of a run and its evaluations.

    Returns:
        lines about what was done, and about what could not be.

    Raises:
        UserError: the run is not tracked, or mlflow is not installed.
    """
    saved = read_saved(record_path(run_dir))
    if saved is None:
        what = "is not tracked: it has no mlflow.json" if run_dir.is_dir() else "does not exist"
        raise UserError(f"run folder {run_dir} {what}")
    _require_mlflow()
    uri = uri_of(run_dir, saved)
    done, undone = [], []
    journals = journal_path(run_dir, "").glob("*.jsonl")
    for path in sorted(journals, key=lambda path: (path.name != PRETRAIN, path.stat().st_mtime)):
        outbox = _outbox(run_dir, path.name, uri)
        name = path.relative_to(run_dir)
        if outbox.is_busy:
            done.append(f"{name} is being delivered by another process")
            continue
        count = outbox.unsent_bytes()
        try:
            while outbox.send_next():
                pass
            done.append(f"{name}: {count} bytes delivered" if count else f"{name}: all was delivered before")
        except Exception as error:
            undone.append(f"MLflow at {without_credentials(uri)}: {reason(error, uri)}; {name} waits")
        if outbox.finish() and path.name != PRETRAIN:
            _remove(path)
    return done, undone


def _outbox(run_dir: Path, name: str, uri: str) -> Outbox:
    path, record = journal_path(run_dir, name), record_path(run_dir)
    remote = RemoteRun(record, uri) if name == PRETRAIN else RemoteRun(path.with_suffix(".json"), uri, record)
    return Outbox(path, remote, _say_of(uri))


def _origin() -> dict[str, str]:
    """Who started the run, by what, from which commit: the tags that MLflow's pages have columns for."""
    tags = {"mlflow.source.name": "moco-dist pretrain", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a container's user without a name
        tags["mlflow.user"] = getpass.getuser()
    if commit := git_state():
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["source.has_changes"] = str(commit.endswith("-dirty")).lower()
    return tags


def _description(config: PretrainConfig) -> str:
    """What the run is, in Markdown. The training adds how far it is, evaluations their accuracies."""
    return without_credentials(
        f"{config.of_method.title}, {config.model.arch}, {config.optim.epochs} epochs of `{config.data.root}` in "
        f"batches of {config.optim.global_batch_size}. Folder: `{config.run.dir.resolve()}`\n"
    )


def _accuracy(percent: float, step: int) -> str:
    return f"{percent:.2f} % at step {step:,}"


def _part_from_original(run_dir: Path, uri: str) -> None:
    """A copy of a run that is trained further is a run of its own, told all that the copied journal has.

    Otherwise the points of two trainings would be one line.
    """
    record, journal = record_path(run_dir), journal_path(run_dir, PRETRAIN)
    saved = read_saved(record)
    original = original_of(run_dir, saved, uri) if saved and journal.is_file() else None
    if original is None:
        return
    begin, _, rest = journal.read_bytes().partition(b"\n")
    own = {**(read_record(begin) or {}), "key": secrets.token_hex(8), "name": run_dir.resolve().name}
    write_whole(journal, json.dumps(own).encode() + b"\n" + rest)
    record.unlink()
    tqdm.write(f"note: {run_dir} is a copy of {original}; it goes on as an MLflow run of its own", file=sys.stderr)


def _begin(name: str, tags: dict[str, str], config: BaseModel) -> dict[str, Any]:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flatten(config).items()}
    params = {name: without_credentials(text) for name, text in texts.items()}
    return {"key": secrets.token_hex(8), "name": name, "tags": tags, "params": params, "time_ms": _now_ms()}


def _remove(journal: Path) -> None:
    journal.unlink(missing_ok=True)
    journal.with_suffix(".json").unlink(missing_ok=True)


def _require_mlflow() -> None:
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("mlflow is not installed; pip install mlflow, or go on without it: --tracking.backend none")
    # mlflow is imported by a thread. As requests is imported it silences a warning about SOCKS, which would be undone
    # by another thread that sets the filters of warnings meanwhile: so it is imported here, before there are any.
    with contextlib.suppress(ImportError):
        importlib.import_module("requests")


def _now_ms() -> int:
    return int(time.time() * 1000)


def _say_of(uri: str):
    return lambda text: tqdm.write(f"warning: MLflow at {without_credentials(uri)}: {text}", file=sys.stderr)
