"""What a run came to: an accuracy table as text, and one self-contained page with curves and pictures.

Evaluates nothing: it shows what config.yaml, log.jsonl, eval/*.json and an imported backbone say, and the images that
it is given.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco_dist.config.address import Url
from moco_dist.config.credentials import without_credentials
from moco_dist.config.pretrain import DataConfig, PretrainConfig
from moco_dist.config.run import RunConfig
from moco_dist.config.source import flatten, leaf_fields
from moco_dist.data.decode import decode_image
from moco_dist.data.folder import read_bytes
from moco_dist.files import write_whole
from moco_dist.provenance import package_versions
from moco_dist.report.charts import Picture, chart, png_uri
from moco_dist.report.html import rendered
from moco_dist.run.folder import RunFolder
from moco_dist.run.logbook import read_log
from moco_dist.run.results import NeighbourRow, Result, read_json
from moco_dist.run.weights import imported_from

ROWS = {"pixels": "raw pixels", "untrained": "untrained", "trained": "pre-trained"}
EVALUATIONS = {"knn": "kNN", "linear": "linear", "finetune": "fine-tuning"}
ALWAYS_SHOWN = ("knn", "linear")
MISSING = "–"
THUMBNAIL_PIXELS = 128
Stored = dict[tuple[str, Path | Url], Image.Image]  # by split, and by what a NeighbourRow calls them
RELOAD_SECONDS = 30  # how often the page of a run that goes on loads itself again


class AccuracyTable(NamedTuple):
    """Heads of the columns, rows of a label and cells, and notes; everything as it is shown."""

    heads: list[str]
    rows: list[tuple[str, list[str]]]
    notes: list[str]


def accuracy_table(run_dir: Path) -> str:
    """Top-1 accuracy of raw pixels, the untrained and the pre-trained encoder by kNN and linear evaluation, as text.

    `–` stands where nothing was evaluated; below the rows is what pre-training added. The numbers are percent of the
    images that the notes name.
    """
    table = _accuracies(run_dir)
    left = max(len(label) for label, _ in table.rows)
    widths = [max(len(head), 8) for head in table.heads]

    def line(label: str, cells: list[str]) -> str:
        return "  ".join([label.ljust(left), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])

    *accuracies, gain = [line(label, cells) for label, cells in table.rows]
    rule = "-" * len(gain)
    return "\n".join([line("", table.heads), *accuracies, rule, gain, *table.notes])


def write_report(
    run_dir: Path,
    view_pairs: Tensor | None = None,
    neighbours: list[NeighbourRow] | None = None,
    map: Picture | None = None,
    stored: Stored | None = None,
) -> Path:
    """Write RUN/report/index.html: one file that needs no other, no network and no script.

    Args:
        run_dir: RUN; only config.yaml has to be there.
        view_pairs: (N, 2, 3, S, S) query and key views of N samples, uint8 or float in [0, 1].
        neighbours: test images and their nearest training images.
        map: a map of test images.
        stored: images of `neighbours` that are no files of their own.

    Returns:
        the page's path.

    Raises:
        UserError: config.yaml is missing or does not fit this version.
    """
    config = RunFolder(run_dir).settings()
    rows = read_log(run_dir)
    page = rendered(
        "page.html",
        name=run_dir.resolve().name,
        summary=_summary(config, rows),
        reload_seconds=RELOAD_SECONDS if _goes_on(run_dir, rows) else 0,
        table=_accuracies(run_dir),
        curves=_curves(rows, evaluations(run_dir), config),
        view_pairs=[] if view_pairs is None else _pair_pictures(view_pairs),
        view_size=0 if view_pairs is None else view_pairs.shape[-1],
        neighbours=[_neighbour_pictures(row, stored or {}) for row in neighbours or []],
        map=map,
        settings=_settings(config),
        versions=package_versions(),
    )
    path = RunFolder(run_dir).report
    write_whole(path, page.encode())
    return path


def evaluations(run_dir: Path) -> dict[tuple[str, str], Result]:
    """What RUN/eval has, by (`knn`, `linear` or `finetune`, encoder).

    Where a part of the labels or of the head was used, the first says so: `finetune_labels0.01`.
    """
    part = r"(?:_labels\d*\.?\d+(?:e-\d+)?)?(?:_head\d+)?"
    name = re.compile(rf"({'|'.join(EVALUATIONS)})_({'|'.join(ROWS)})({part})")
    found = {}
    for path in RunFolder(run_dir).results():
        if match := name.fullmatch(path.stem):
            found[match[1] + match[3], match[2]] = read_json(path, Result, "remove it, and evaluate again")
    return found


def _kinds(found: dict[tuple[str, str], Result]) -> list[str]:
    """The columns as `evaluations` calls them: first the ones that are always there, then those that have a result."""
    return list(dict.fromkeys([*ALWAYS_SHOWN, *(kind for kind, _ in found)]))


def _title(kind: str) -> str:
    """`finetune_labels0.01` as `fine-tuning, 1 % of labels`."""
    base, *parts = kind.split("_")
    words = [EVALUATIONS[base]]
    for part in parts:
        if part.startswith("labels"):
            words.append(f"{100 * float(part.removeprefix('labels')):g} % of labels")
        else:
            words.append(f"{part.removeprefix('head')} layer(s) of the head")
    return ", ".join(words)


def _accuracies(run_dir: Path) -> AccuracyTable:
    found = evaluations(run_dir)
    names = {name for (kind, _), result in found.items() if kind == "knn" for name in result["accuracy"]}
    # k = 20 is where MoCo v2 on ImageNet is best; one k for all rows, or they could not be compared.
    knn = "knn_top1_k20" if "knn_top1_k20" in names or not names else min(names, key=_k)
    kinds = _kinds(found)

    def accuracy(kind: str, encoder: str) -> float | None:
        base = kind.partition("_")[0]
        return found.get((kind, encoder), {}).get("accuracy", {}).get(knn if base == "knn" else f"{base}_top1")

    table = {encoder: [accuracy(kind, encoder) for kind in kinds] for encoder in ROWS}
    rows = [(ROWS[e], [MISSING if a is None else f"{a:.2f}" for a in values]) for e, values in table.items()]
    gains = [
        None if a is None or b is None else a - b
        for a, b in zip(*(table[e] for e in ("trained", "untrained")), strict=True)
    ]
    rows.append((f"{ROWS['trained']} − {ROWS['untrained']}", [MISSING if g is None else f"{g:+.2f}" for g in gains]))
    heads = [f"{_title(k)} top-1 %" + (f", k = {_k(knn)}" if k.startswith("knn") else "") for k in kinds]
    return AccuracyTable(heads, rows, _notes(found, imported_from(run_dir)))


def _k(name: str) -> int:
    return int(re.sub(r"\D", "", name.rpartition("_k")[2]) or 0)


def _notes(found: dict[tuple[str, str], Result], imported: str) -> list[str]:
    """How many images and which step the numbers stand for, and what spoils the comparison."""
    notes = []
    for kind in _kinds(found):
        sizes = {(r["num_train"], r["num_val"]) for (k, _), r in found.items() if k == kind}
        parts = [f"{train:,} training and {val:,} test images" for train, val in sorted(sizes)]
        if parts:
            caution = " (the rows differ and cannot be compared)" if len(parts) > 1 else ""
            notes.append(f"{_title(kind)}: {'; '.join(parts)}{caution}")
    steps: dict[str, int] = {kind: r["step"] for (kind, encoder), r in found.items() if encoder == "trained"}
    if steps:
        same = len(set(steps.values())) == 1
        each = [f"{_title(kind)} at step {step:,}" for kind, step in steps.items()]
        text = f"step {max(steps.values()):,}" if same else ", ".join(each)
        if imported and not any(steps.values()):
            text = f"imported from {imported}"
        notes.append(f"{ROWS['trained']}: {text}")
    if any((kind, encoder) not in found for kind in ALWAYS_SHOWN for encoder in ROWS):
        notes.append(f"{MISSING}: not evaluated (moco-dist knn, moco-dist linear)")
    return notes


def _summary(config: PretrainConfig, rows: list[dict[str, Any]]) -> list[str]:
    model, optim = config.model, config.optim
    summary = [
        f"{model.arch} on {config.data.root}",
        f"{optim.epochs} epochs, batch {optim.global_batch_size}",
        config.of_method.described().replace("tau", "τ"),
    ]
    trained = [row for row in rows if "epoch" in row]
    if trained:
        last = trained[-1]
        summary.append(f"step {last['step']:,} (epoch {last['epoch']:.1f}), {last['images_per_second']:.0f} images/s")
    return summary


def _goes_on(run_dir: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether the run has not come to its end, as far as its folder tells: one that was killed goes on when started."""
    left = [row["eta_seconds"] for row in rows if "eta_seconds" in row]
    return left[-1] > 0 if left else not RunFolder(run_dir).backbone.exists()


def _curves(rows: list[dict[str, Any]], found: dict[tuple[str, str], Result], config: PretrainConfig) -> list[Picture]:
    """The charts of what was logged, and of the linear classifiers' training; what was not logged has none."""

    def logged(key: str) -> tuple[list[float], list[float]]:
        points = [(row["step"], row[key]) for row in rows if key in row]
        return [x for x, _ in points], [y for _, y in points]

    def trained_with_labels(kind: str, encoder: str) -> tuple[list[float], list[float]]:
        points = [p for p in found.get((kind, encoder), {}).get("curve") or [] if "top1" in p]
        return [p["epoch"] for p in points], [p["top1"] for p in points]

    method = config.of_method
    chance = math.log(method.num_negatives(config.optim.global_batch_size) + 1)
    chance_line = (chance, f"chance: {method.chance_formula} = {chance:.2f}")
    last_step = rows[-1]["step"] if rows else 0
    charts = [
        ("loss (InfoNCE)", "step", {"loss": logged("loss")}, chance_line),
        ("learning rate", "step", {"lr": logged("lr")}, None),
        ("contrastive accuracy, %", "step", {f"top-{k}": logged(f"contrastive_top{k}") for k in (1, 5)}, None),
        ("top-1 during training, %", "step", {"kNN": logged("knn_top1"), "linear probe": logged("probe_top1")}, None),
        ("RankMe of the features: dimensions", "step", {"RankMe": logged("rankme")}, None),
        ("spread of the embeddings", "step", {"std": logged("embedding_std")}, (0.0, "0: collapsed")),
        ("images per second", "step", {"images/s": logged("images_per_second")}, None),
        ("linear evaluation: top-1, %", "epoch",
         {ROWS[e]: trained_with_labels("linear", e) for e in reversed(ROWS)}, None),
        *((f"{_title(kind)}: top-1, %", "epoch",
           {ROWS[e]: trained_with_labels(kind, e) for e in reversed(ROWS)}, None)
          for kind in _kinds(found) if kind.startswith("finetune")),
    ]  # fmt: skip
    pictures = []
    for title, x_label, series, reference in charts:
        series = {label: points for label, points in series.items() if points[0]}
        if series:
            last_x = last_step if x_label == "step" else max(x[-1] for x, _ in series.values())
            pictures.append(chart(title, x_label, last_x, series, reference))
    return pictures


def _pair_pictures(view_pairs: Tensor) -> list[tuple[Picture, Picture]]:
    if view_pairs.is_floating_point():
        view_pairs = (view_pairs * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = view_pairs.permute(0, 1, 3, 4, 2).cpu().numpy()
    return [
        (Picture(png_uri(q), f"query view of sample {i + 1}"), Picture(png_uri(k), f"key view of sample {i + 1}"))
        for i, (q, k) in enumerate(pixels)
    ]


def _neighbour_pictures(row: NeighbourRow, stored: Stored) -> tuple[Picture, list[tuple[Picture, bool]]]:
    """The query, and each neighbour with whether it is of the query's class."""
    query = Picture(_thumbnail("val", row.query, stored), f"test image: {row.query_label}", row.query_label)
    neighbours = [
        (Picture(_thumbnail("train", path, stored), f"neighbour {i}: {label}", label), label == row.query_label)
        for i, (path, label) in enumerate(zip(row.neighbours, row.neighbour_labels, strict=False), start=1)
    ]
    return query, neighbours


def _thumbnail(split: str, file: Path | Url, stored: Stored) -> str | None:
    small = stored.get((split, file))
    if small is None:
        if isinstance(file, Url):
            return None
        try:
            small = decode_image(read_bytes(file), str(file))
        except ValueError:
            return None  # moved since the evaluation: the labels still say something
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return png_uri(np.asarray(small))


def _settings(config: PretrainConfig) -> list[dict[str, Any]]:
    """Every setting: name, value, default, whether it differs, and what it means."""
    default = flatten(PretrainConfig(run=RunConfig(dir=config.run.dir), data=DataConfig(root=config.data.root)))
    fields = leaf_fields(PretrainConfig)
    return [
        {
            "name": name,
            "value": without_credentials(shown(value)),
            "default": "required" if fields[name].is_required() else shown(default[name]),
            "differs": value != default[name],
            "text": fields[name].description or "",
        }
        for name, value in flatten(config).items()
    ]


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
