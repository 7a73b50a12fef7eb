"""Several runs side by side: what differs in their settings, what they came to and what they cost.

Runs come from their folders, or from an MLflow experiment when the folders are elsewhere.
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_dist.config.credentials import without_credentials
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import declarations, flatten
from moco_dist.errors import UnreachableError, UserError, nearest
from moco_dist.report.charts import COLOURS, Picture, chart
from moco_dist.report.html import rendered
from moco_dist.report.page import EVALUATIONS, MISSING, evaluations, shown
from moco_dist.run import checkpoint
from moco_dist.run.folder import RunFolder
from moco_dist.run.logbook import read_log
from moco_dist.run.manifest import read_manifest
from moco_dist.tracking import client_of, page_of, run_page
from moco_dist.tracking.failure import reason
from moco_dist.tracking.server import absolute, require_usable

if TYPE_CHECKING:
    from mlflow import MlflowClient

CURVES = {
    "loss": "loss",
    "knn_top1": "kNN top-1 during training, %",
    "probe_top1": "linear probe's top-1 during training, %",
    "rankme": "RankMe of the features during training",
    "contrastive_top1": "contrastive top-1, %",
    "embedding_std": "spread of the embeddings",
}


@dataclass(frozen=True)
class RunRecord:
    """What one run was and came to.

    Attributes:
        name: unique among those compared.
        settings: dotted name to value, as text.
        log: one row a log interval, with `step`.
        accuracy: percent, of the trained encoder.
        world_size: devices, at the end; 0 where unknown.
        link: a page of MLflow, or "".
    """

    name: str
    settings: dict[str, str]
    log: list[dict[str, Any]]
    accuracy: dict[str, float]
    world_size: int
    link: str

    @property
    def images_per_second(self) -> float | None:
        """Median over the log's intervals."""
        rates = sorted(row["images_per_second"] for row in self.log if "images_per_second" in row)
        return rates[len(rates) // 2] if rates else None

    @property
    def device_hours(self) -> float | None:
        """Time of the steps alone, on all devices."""
        rows, batch = [row for row in self.log if "images_per_second" in row], self._batch_size
        if not (rows and batch and self.world_size):
            return None
        steps = [b["step"] - a["step"] for a, b in zip([{"step": 0}, *rows], rows, strict=False)]
        seconds = sum(n * batch / row["images_per_second"] for n, row in zip(steps, rows, strict=True))
        return seconds * self.world_size / 3600

    @property
    def _batch_size(self) -> int:
        return int(self.settings.get("optim.global_batch_size", 0))


@dataclass(frozen=True)
class Comparison:
    """A table and curves, as they are shown.

    Attributes:
        heads: `run`, the settings that differ, and the results.
        rows: a run each.
        links: a page of MLflow for each row, or "".
        curves: charts with one line for each run.
        note: which runs have a line, where not all have; or "".
    """

    heads: list[str]
    rows: list[list[str]]
    links: list[str]
    curves: list[Picture]
    note: str


def run_of_folder(run_dir: Path) -> RunRecord:
    """A run from its folder.

    Raises:
        UserError: it is not one.
    """
    config = RunFolder(run_dir).settings()
    found = evaluations(run_dir)
    accuracy = {}
    for kind in EVALUATIONS:
        accuracy |= found.get((kind, "trained"), {}).get("accuracy", {})
    saved = checkpoint.complete_checkpoints(run_dir)
    world_size = read_manifest(saved[-1])["world_size"] if saved else 0
    settings = {name: without_credentials(shown(value)) for name, value in flatten(config).items()}
    return RunRecord(run_dir.resolve().name, settings, read_log(run_dir), accuracy, world_size, page_of(run_dir))


def runs_of_experiment(name: str, uri: str) -> list[RunRecord]:
    """The pre-trainings of an MLflow experiment, oldest first, each with its evaluations.

    Raises:
        UserError: `uri` is not one of MLflow's, there is no such experiment, or no run in it.
        UnreachableError: the server does not answer, or refuses.
    """
    uri = absolute(uri)
    require_usable(uri)
    client = client_of(uri)
    from mlflow.exceptions import MlflowException

    try:
        return _runs_of_experiment(client, name, uri)
    except MlflowException as error:
        raise UnreachableError(f"MLflow at {without_credentials(uri)}: {reason(error, uri)}") from error


def _runs_of_experiment(client: "MlflowClient", name: str, uri: str) -> list[RunRecord]:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = [experiment.name for experiment in client.search_experiments()]
        raise UserError(f"MLflow at {without_credentials(uri)} has no experiment {name!r}{nearest(name, known)}")
    runs, token = [], None
    while token != "":  # by pages of at most 1,000
        page = client.search_runs(
            [experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000, page_token=token
        )
        runs += page
        token = page.token or ""
    accuracy: dict[str, dict[str, float]] = {}
    for run in runs:
        if run.data.tags.get("encoder") == "trained":
            accuracy.setdefault(run.data.tags.get("mlflow.parentRunId", ""), {}).update(run.data.metrics)
    records = []
    for run in runs:
        if "mlflow.parentRunId" in run.data.tags or not run.data.params:
            continue
        rows: dict[int, dict[str, Any]] = {}
        for key in (*CURVES, "images_per_second"):
            for metric in client.get_metric_history(run.info.run_id, key):
                rows.setdefault(metric.step, {"step": metric.step})[key] = metric.value
        page = run_page(uri, experiment.experiment_id, run.info.run_id)
        records.append(RunRecord(
            run.info.run_name or run.info.run_id, dict(run.data.params), [rows[step] for step in sorted(rows)],
            accuracy.get(run.info.run_id, {}), int(run.data.tags.get("world_size", 0)),
            without_credentials(page) if uri.startswith("http") else "",
        ))  # fmt: skip
    if not records:
        raise UserError(f"MLflow experiment {name!r} has no pre-training")
    return records


def compare(records: list[RunRecord]) -> Comparison:
    """The table and the overlaid curves.

    Raises:
        UserError: two runs have the same name.
    """
    names = [record.name for record in records]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two runs are called {', '.join(sorted(twice))}; compare folders of different names")
    records_alone = [name for name, it in declarations(PretrainConfig).items() if it["changes"] == "record"]
    keys = [
        key for key in dict.fromkeys(key for record in records for key in record.settings)
        if len({record.settings.get(key) for record in records}) > 1 and key not in records_alone
    ]  # fmt: skip
    accuracies = [
        name for name in dict.fromkeys(name for record in records for name in record.accuracy)
        if name in ("knn_top1_k20", "linear_top1", "linear_best_top1", "finetune_top1")
    ]  # fmt: skip
    results = [*(f"{name} %" for name in accuracies), "loss", "steps", "images/s", "device hours"]
    heads = ["run", *results, *keys]  # what a run came to is seen without scrolling, however much differs
    rows = []
    for record in records:
        losses = [row["loss"] for row in record.log if "loss" in row]
        numbers = [
            *((record.accuracy.get(name), ".2f") for name in accuracies),
            (losses[-1] if losses else None, ".4f"),
            (record.log[-1]["step"] if record.log else None, "d"),
            (record.images_per_second, ".0f"),
            (record.device_hours, ".3g"),
        ]
        rows.append([
            record.name, *(MISSING if number is None else format(number, style) for number, style in numbers),
            *(record.settings.get(key, MISSING) for key in keys),
        ])  # fmt: skip
    drawn, by = _best(records, len(COLOURS))
    note = f"Curves are of the {len(drawn)} runs that are best by {by}." if len(drawn) < len(records) else ""
    return Comparison(heads, rows, [record.link for record in records], _curves(drawn), note)


def _best(records: list[RunRecord], count: int) -> tuple[list[RunRecord], str]:
    """The best runs, in their own order, and what they are best by: an accuracy if there is one, else the last loss."""

    def loss(record: RunRecord) -> float:
        return next((row["loss"] for row in reversed(record.log) if "loss" in row), math.inf)

    for name in ("linear_top1", "knn_top1_k20", ""):
        if not name or any(name in record.accuracy for record in records):
            ranked = sorted(records, key=lambda it: (-it.accuracy.get(name, -1.0), loss(it)))[:count]
            return [record for record in records if record in ranked], name or "loss"
    raise AssertionError


def _curves(records: list[RunRecord]) -> list[Picture]:
    last_step = max((row["step"] for record in records for row in record.log), default=0)
    pictures = []
    for key, title in CURVES.items():
        series = {}
        for record in records:
            points = [(row["step"], row[key]) for row in record.log if key in row]
            if points:
                series[record.name] = ([x for x, _ in points], [y for _, y in points])
        if series:
            pictures.append(chart(title, "step", last_step, series, None))
    return pictures


def as_markdown(comparison: Comparison) -> str:
    """The table in Markdown; a run with a page is a link to it."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [
        [f"[{cell(row[0])}]({link})" if link else cell(row[0]), *map(cell, row[1:])]
        for row, link in zip(comparison.rows, comparison.links, strict=True)
    ]
    return "\n".join([line(comparison.heads), line(["---"] * len(comparison.heads)), *map(line, rows)]) + "\n"


def as_csv(comparison: Comparison) -> str:
    """The table with commas."""
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows([comparison.heads, *comparison.rows])
    return text.getvalue()


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """Write OUT/index.html (self-contained), compare.md, compare.csv and curves/*.png; returns the page's path."""
    page = rendered("compare.html", comparison=comparison)
    (out / "curves").mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(as_markdown(comparison), encoding="utf-8")
    (out / "compare.csv").write_text(as_csv(comparison), encoding="utf-8")
    for picture in comparison.curves:
        key = next(key for key, title in CURVES.items() if title == picture.caption)
        (out / "curves" / f"{key}.png").write_bytes(picture.png())
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path
