"""The tables of README.md and docs/benchmarks.md, from results/*.json.

    python -m benchmarks.tables

Writes each table between its markers, `<!-- benchmarks:NAME -->` and `<!-- /benchmarks -->`. Of a theme, the newest
result on CPUs and the newest on each GPU are shown; what was not run is not in the tables.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER
from moco_dist.planning.table3 import as_markdown

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/benchmarks.md")
MARKED = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)

Result = dict[str, Any]


def newest(theme: str) -> list[Result]:
    """The newest result of a theme on each hardware."""
    found: dict[str, Result] = {}
    for path in sorted(FOLDER.glob(f"{theme}_*.json"), key=lambda path: path.stem.rsplit("_", 1)[1]):
        found[path.stem.rsplit("_", 1)[0]] = json.loads(path.read_text())
    return list(found.values())


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origin(result: Result) -> str:
    """Where the numbers of a table come from."""
    return f"\n{result['hardware']}, torch {result['versions']['torch']}, {result['date']}: `{result['command']}`\n"


def network(result: Result) -> str:
    """Bytes and seconds between hosts."""
    rows = [
        [str(r["hosts"]), f"{r['gigabit_per_second']:g}", r["exchange"], f"{r['received_bytes'] / 1e6:.3f}",
         f"{(r['predicted_image_bytes'] + r['predicted_feature_bytes']) / 1e6:.3f}",
         f"{r['predicted_image_bytes'] / 1e6:.3f}",
         f"{(r['received_bytes_with_gradients'] - r['received_bytes']) / 1e6:.1f}", f"{r['step_seconds']:.2f}"]
        for r in result["rows"]
    ]  # fmt: skip
    columns = ["hosts", "Gb/s", "`shuffle.exchange`", "received, MB", "predicted, MB", "of it images, MB",
               "gradients, MB", "step, s"]  # fmt: skip
    return markdown(columns, rows) + origin(result)


def peer_step(result: Result) -> str:
    """This program's step beside lightly's."""
    rows = [
        [r["link"], *(f"{seconds:.2f}" for seconds in r["step_seconds"].values()),
         *(f"{ratio:.2f}" for ratio in r["ratio_to_moco_dist"].values())]
        for r in result["rows"]
    ]  # fmt: skip
    first = result["rows"][0]
    columns = ["link", *(f"{name}, s" for name in first["step_seconds"]),
               *(f"{name} / moco_dist" for name in first["ratio_to_moco_dist"])]  # fmt: skip
    return markdown(columns, rows) + origin(result)


def infonce(result: Result) -> str:
    """The loss alone."""
    ways = ("moco_dist", "cat + cross_entropy")

    def cell(row: Result, key: str, way: str, unit: float, form: str) -> str:
        return format(row[key][way] * unit, form) if way in row[key] else "does not fit"

    columns = ["N", "K", *(f"{way}: {what}" for way in ways for what in ("ms", "peak MB", "error"))]
    rows = [
        [str(r["num_queries"]), f"{r['num_keys']:,}",
         *(cell(r, key, way, unit, form) for way in ways
           for key, unit, form in (("seconds", 1e3, ".0f"), ("peak_bytes", 1e-6, ".0f"), ("relative_error", 1, ".0e")))]
        for r in result["rows"]
    ]  # fmt: skip
    return markdown(columns, rows) + origin(result)


def update(result: Result) -> str:
    """Momentum update and optimiser."""
    rows = [
        [r["what"], f"{1e3 * r['seconds']:.1f}", f"{1e3 * r['floor_seconds']:.1f}",
         f"{r['seconds'] / r['floor_seconds']:.1f}"]
        for r in result["rows"]
    ]  # fmt: skip
    return markdown(["", "ms", "bytes / bandwidth, ms", "ratio"], rows) + origin(result)


def step_parts(result: Result) -> str:
    """A step by its parts, and beside a supervised one."""
    encoders = ("key forward", "query forward", "backward")
    rest = ("colours", "momentum update", "loss and queue", "optimiser", "other")
    columns = ["", "local batch", "step, s", "images/s", "of the ceiling, %",
               *(f"{part}, %" for part in encoders + rest),
               "encoders' floor, s", "data wait, %"]  # fmt: skip
    rows = [
        [r["way"], str(r["local_batch"]), f"{r['seconds']['moco']:.3g}", f"{r['images_per_second']:.3g}",
         f"{100 * r['share_of_ceiling']:.0f}", *(f"{100 * r['share_of_step'][part]:.1f}" for part in encoders + rest),
         f"{r['floor_seconds']['convolutions and products']:.3g}", f"{100 * r['data_wait_share']:.0f}"]
        for r in result["rows"]
    ]  # fmt: skip
    return markdown(columns, rows) + origin(result)


def table3(result: Result) -> str:
    """Memory and time of MoCo and the end-to-end method."""
    facts = f"{result['arch']}, {result['image_size']} px, {result['dtype']}, K {result['queue_size']:,}.\n"
    return f"{as_markdown(result['rows'])}\n{facts}{origin(result)}"


def plan_validation(result: Result) -> str:
    """Predicted beside measured."""
    columns = ["hosts", "Gb/s", "`shuffle.exchange`", "step, s: predicted", "measured", "error, %",
               "received, MB: predicted", "measured"]  # fmt: skip
    rows = [
        [str(r["hosts"]), f"{r['gigabit_per_second']:g}" if r["hosts"] > 1 else "–", r["exchange"],
         f"{r['predicted_seconds']:.3f}", f"{r['measured_seconds']:.3f}", f"{r['seconds_error_percent']:+.1f}",
         f"{r['predicted_bytes'] / 1e6:.2f}", f"{r['measured_bytes'] / 1e6:.2f}"]
        for r in result["rows"]
    ]  # fmt: skip
    return markdown(columns, rows) + origin(result)


TABLES: dict[str, Callable[[Result], str]] = {
    table.__name__: table for table in (network, peer_step, step_parts, infonce, update, table3, plan_validation)
}


def filled(page: str) -> str:
    """`page` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        texts = [TABLES[match[2]](result) for result in newest(match[2])]
        return match[1] + ("\n".join(texts) or "Not run yet.\n") + match[3]

    return MARKED.sub(table, page)


def main() -> None:
    """Rewrite the pages."""
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
