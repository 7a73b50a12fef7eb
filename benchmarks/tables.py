"""The tables of README.md and of pages in docs/, from results/*.json.

    python -m benchmarks.tables

Writes each table between its markers, `<!-- benchmarks:NAME -->` and `<!-- /benchmarks -->`. Of a theme, the newest
result on CPUs and the newest on each GPU are shown; what was not run is not in the tables. README's table, `headlines`,
has a number or two of each theme.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER
from moco_dist.planning.table3 import as_markdown

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/data.md", "docs/own-data.md")
MARKED = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)

Result = dict[str, Any]


def newest(theme: str) -> list[Result]:
    """The newest result of a theme on each hardware."""
    found: dict[str, Result] = {}
    # The device after the name: `checkpoint` is not the beginning of `checkpoint_planning`.
    for path in sorted(FOLDER.glob(f"{theme}_c[pu]*-*.json"), key=lambda path: path.stem.rsplit("_", 1)[1]):
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
        [f"{r['hosts']} × {r.get('ranks', r['hosts']) // r['hosts']}", f"{r['gigabit_per_second']:g}",
         str(r.get("block_size", result["local_batch_size"] * r["hosts"])), r["exchange"],
         f"{r['received_bytes'] / 1e6:.3f}",
         f"{(r['predicted_image_bytes'] + r['predicted_feature_bytes']) / 1e6:.3f}",
         f"{r['predicted_image_bytes'] / 1e6:.3f}",
         f"{(r['received_bytes_with_gradients'] - r['received_bytes']) / 1e6:.1f}", f"{r['step_seconds']:.2f}"]
        for r in result["rows"]
    ]  # fmt: skip
    columns = ["hosts × ranks", "Gb/s", "block", "`shuffle.exchange`", "received, MB", "predicted, MB",
               "of it images, MB", "gradients, MB", "step, s"]  # fmt: skip
    return markdown(columns, rows) + origin(result)


def peer_step(result: Result) -> str:
    """This program's step beside lightly's."""
    rows = [
        [r["link"], str(r.get("local_batch", result.get("local_batch"))),
         *(f"{seconds:.3g}" for seconds in r["step_seconds"].values()),
         *(f"{ratio:.2f}" for ratio in r["ratio_to_moco_dist"].values())]
        for r in result["rows"]
    ]  # fmt: skip
    first = result["rows"][0]
    columns = ["link", "images a rank", *(f"{name}, s" for name in first["step_seconds"]),
               *(f"{name} / moco_dist" for name in first["ratio_to_moco_dist"])]  # fmt: skip
    return markdown(columns, rows) + origin(result)


def infonce(result: Result) -> str:
    """The loss alone."""
    ways = list(result["rows"][0]["seconds"])

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
         f"{r['floor_seconds']['convolutions and products']:.3g}",
         "–" if r["data_wait_share"] is None else f"{100 * r['data_wait_share']:.0f}"]
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


def loader(result: Result) -> str:
    """Crops of a JPEG by each loader."""
    rows = [
        [r["name"], f"{r['cpu_ms_per_image']:.2f}", f"{r['images_per_second_per_core']:,.0f}",
         f"{r['times_the_usual']:.3g}"]
        for r in result["rows"]
        if r["cpu_ms_per_image"] is not None
    ]  # fmt: skip
    decoding = result["decoding"]
    facts = f"Decoding alone: {decoding['ours_ms']:.2f} ms"
    if "share_of_floor" in decoding:
        facts += (f"; libjpeg-turbo's least for the region around both crops: {decoding['floor_region_ms']:.2f} ms, so "
                  f"{100 * decoding['share_of_floor']:.0f} % of the floor")  # fmt: skip
    facts += f". Images cut out of {result.get('cut_out_of', 'photographs')}.\n"
    columns = ["", "CPU ms an image", "images/s a core", "× the usual"]
    return f"{markdown(columns, rows)}\n{facts}{origin(result)}"


def loader_parts(result: Result) -> str:
    """A loader's time by its parts."""
    rows = [[r["part"], f"{r['cpu_ms_per_image']:.3f}", f"{100 * r['share']:.0f}"] for r in result["rows"]]
    facts = f"Images cut out of {result['cut_out_of']}.\n"
    return f"{markdown(['', 'CPU ms an image', '%'], rows)}\n{facts}{origin(result)}"


def sources(result: Result) -> str:
    """Loading by what the images lie in."""
    rows = [
        [r["name"], f"{r['images_per_second']:,.0f}", f"{r['rate_beside_folder']:.2f}", f"{r['cpu_ms_per_image']:.2f}",
         f"{r['cpu_beside_folder']:.2f}"]
        for r in result["rows"]
    ]  # fmt: skip
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    facts = f"{result['images']:,} images of {' × '.join(map(str, result['image_size']))}, {result['rounds']} rounds"
    facts += f"; {peers}.\n" if peers else ".\n"
    if (load := result["load_average_before"]) > 0.5:
        facts += f"Other work ran on the cores (load average {load:g} before): the CPU time says more than the rates.\n"
    if index := result.get("index"):
        facts += f"Listing {index['images']:,} images of {index['image_bytes']:,} bytes in {index['shards']:,} shards "
        facts += f"of the store by their headers: {index['requests']:,} requests, {index['seconds']:.1f} s.\n"
    columns = ["", "images/s", "× the folder's rate", "CPU ms an image", "× the folder's CPU"]
    return f"{markdown(columns, rows)}\n{facts}{origin(result)}"


def parquet(result: Result) -> str:
    """One image of a parquet file."""
    rows = [
        [r["name"], f"{r['read_bytes_per_image'] / 1e3:,.0f}",
         f"{r['read_bytes_per_image'] / result['image_bytes']:.3g}", f"{r['cpu_ms_per_image']:.3f}"]
        for r in result["rows"]
    ]  # fmt: skip
    facts = f"Row groups of {result['rows_a_group']} images; images cut out of {result['cut_out_of']}.\n"
    columns = ["", "kB read for an image", "× its bytes", "CPU ms an image"]
    return f"{markdown(columns, rows)}\n{facts}{origin(result)}"


def index(result: Result) -> str:
    """Opening an index."""
    rows = [
        [r["name"] if r["shards"] is None else f"{r['shards']:,} {r['name']}", f"{r['images']:,}",
         f"{r['index_bytes'] / 1e6:,.0f}", f"{r['open_seconds']:.2f}",
         f"{r['store_seconds']:.2f}" if r.get("store_seconds", 0) > 1e-3 else "–", f"{r['hash_seconds']:.2f}",
         f"{r['own_bytes'] / 1e6:.0f}", f"{r['worker_grown_bytes'] / 1e6:.1f}"]
        for r in result["rows"]
    ]  # fmt: skip
    listing = result["listing"]
    facts = (f"Listing the folder of {listing['images']:,} images anew: {listing['seconds']:.1f} s "
             f"({result['file_system']}). Load average at the end: {result['load_average']:.0f}.\n")  # fmt: skip
    columns = ["index of", "images", "MB, mapped", "opens in, s", "of it the store's listing", "then hashed in, s",
               "process's own memory, MB", f"a worker's after {result['asked_of_each']:,} images, MB"]  # fmt: skip
    return f"{markdown(columns, rows)}\n{facts}{origin(result)}"


def exchange(result: Result) -> str:
    """Loading by world size and `shuffle.exchange`."""
    rows = [
        [str(r["ranks"]), str(r["hosts"]), r["exchange"], f"{r['cpu_ms_per_image']:.2f}",
         f"{r['times_loader']:.2f}" if r["times_loader"] else "–", f"{r['decodes_per_sample']:.2f}",
         f"{r['received_bytes'] / 1e6:.1f}"]
        for r in result["rows"]
    ]  # fmt: skip
    columns = ["ranks", "hosts", "`shuffle.exchange`", "CPU ms an image", "× `loader`", "decodes a sample",
               "MB to a rank and step"]  # fmt: skip
    return markdown(columns, rows) + origin(result)


def augment(result: Result) -> str:
    """Colours of a view."""
    rows = [[r["way"], f"{r['milliseconds_a_view']:.2f}", f"{r['times_moco_dist']:.1f}"] for r in result["rows"]]
    return markdown(["", "ms a view", "× moco_dist"], rows) + origin(result)


def checkpoint(result: Result) -> str:
    """How long training waits for one."""
    rows = [[r["kind"], f"{r['stall_seconds']:.2f}"] for r in result["rows"]]
    return markdown([f"a checkpoint of {result['bytes'] / 1e6:.0f} MB", "training waits, s"], rows) + origin(result)


def checkpoint_planning(result: Result) -> str:
    """What planning a checkpoint costs rank 0."""
    ways = list(result["rows"][0]["ways"])
    rows = [
        [f"{r['ranks']:,}", *(f"{r['ways'][way]:.3g}" for way in ways), f"{r['ratio_of_medians']:.0f}"]
        for r in result["rows"]
    ]
    return markdown(["ranks", *(f"{way}, s" for way in ways), "ratio"], rows) + origin(result)


def demo_seeds(result: Result) -> str:
    """The demo's accuracies: mean and range over seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(row["instructions"], []).append(row)

    def spread(values: list[float], sign: str = "") -> str:
        return f"{sum(values) / len(values):{sign}.1f} ({min(values):{sign}.1f} to {max(values):{sign}.1f})"

    names = {"raw pixels": "pixels", "untrained": "untrained", "pre-trained": "trained"}
    rows = [[label, *(spread([row[f"{kind}_{encoder}"] for row in group])
                      for group in groups.values() for kind in ("knn", "linear"))]
            for label, encoder in names.items()]  # fmt: skip
    rows.append(["pre-trained − untrained",
                 *(spread([row[f"{kind}_trained"] - row[f"{kind}_untrained"] for row in group], "+")
                   for group in groups.values() for kind in ("knn", "linear"))])  # fmt: skip
    columns = ["", *(f"{title}, {group[0]['capability']}" for group in groups.values()
                     for title in ("kNN top-1 %, k = 20", "linear top-1 %"))]  # fmt: skip
    seeds = "; ".join(
        f"{group[0]['capability']}: {len(group)} seeds, "
        f"{spread([(row['cpu_seconds'] + row['data_cpu_seconds']) / 2 for row in group])} s of two cores each"
        for group in groups.values()
    )
    return f"{markdown(columns, rows)}\n{seeds}.\n{origin(result)}"


def patches(result: Result) -> str:
    """What the recipe for a small real set gains with each seed, and its variants with the same seed."""
    untrained = {row["seed"]: row for row in result["rows"] if row["variant"] == "recipe"}
    rows = []
    for row in sorted(result["rows"], key=lambda row: (row["variant"] != "recipe", row["variant"], row["seed"])):
        before = untrained[row["seed"]]
        cells = [cell for kind in ("knn", "linear") for cell in (
            f"{before[f'{kind}_untrained']:.1f}", f"{row[f'{kind}_trained']:.1f}",
            f"{row[f'{kind}_trained'] - before[f'{kind}_untrained']:+.1f}")]  # fmt: skip
        rows.append([row["variant"], str(row["seed"]), *cells, f"{row['pretrain_cpu_seconds'] / 60:.1f}"])
    columns = ["", "seed", *(f"{kind}{what}" for kind in ("kNN", "linear") for what in (", untrained", "", ", gain")),
               "CPU minutes to pre-train"]  # fmt: skip
    pixels = next(iter(untrained.values()))
    knn, linear = (pixels[f"{kind}_pixels"] for kind in ("knn", "linear"))
    facts = f"Top-1 in percent, kNN with k = 20; raw pixels have {knn:.1f} by kNN and {linear:.1f} by linear.\n"
    return f"{markdown(columns, rows)}\n{facts}{origin(result)}"


def headlines() -> str:
    """What each theme comes to: here, and in the way that is usual."""
    rows: list[list[str]] = []

    def add(result: Result, what: str, here: float, other: float, way: str, unit: str) -> None:
        numbers = [f"{here:.3g} {unit}", f"{other:.3g} {unit}, {way}", f"{other / here:.3g}"]
        rows.append([what, *numbers, result["hardware"]])

    for result in newest("network"):
        most = max(r["hosts"] for r in result["rows"])
        received = {r["exchange"]: r["received_bytes"] / 1e6 for r in result["rows"]
                    if r["hosts"] == r.get("ranks", most) == most}  # fmt: skip
        images = result["local_batch_size"]
        what = f"received by a rank in a step, beside gradients; {most} hosts, {images} images on each"
        add(result, what, received["loader"], received["all_gather"], "all images gathered", "MB")
    for result in newest("peer_step"):
        most = max(row.get("local_batch", 0) for row in result["rows"])
        for row in (row for row in result["rows"] if row.get("local_batch", 0) == most):
            seconds = row["step_seconds"]
            way = f"lightly's MoCo ({seconds['lightly channels-last']:.3g} s in channels-last)"
            what = f"a step of {result['arch']}, {result['ranks']} rank(s), {row['link']}"
            add(result, what, seconds["moco_dist"], seconds["lightly"], way, "s")
    for result in newest("infonce"):
        row = next(r for r in result["rows"] if (r["num_queries"], r["num_keys"]) == (256, 65536))
        ours, usual = 1e3 * row["seconds"]["moco_dist"], 1e3 * row["seconds"]["cat + cross_entropy"]
        add(result, "loss and gradient; 256 queries, 65,536 keys", ours, usual, "`cat` and `cross_entropy`", "ms")
    for result in newest("loader"):
        ms = {r["name"]: r["cpu_ms_per_image"] for r in result["rows"]}
        here, usual = ms["loader torchvision"], ms["torchvision transforms, crops alone"]
        add(result, "two crops of a photograph; one core", here, usual, "torchvision's transforms", "ms")
    for result in newest("exchange"):
        ms = {(r["ranks"], r["hosts"], r["exchange"]): r["cpu_ms_per_image"] for r in result["rows"]}
        what = "loading two crops of a photograph by 8 ranks of a host, the exchange included; one core"
        add(result, what, ms[8, 1, "auto"], ms[8, 1, "loader"], "key views decoded where they are encoded", "ms")
    for result in newest("checkpoint"):
        waits = {r["kind"]: r["stall_seconds"] for r in result["rows"]}
        what = f"training waits for a checkpoint of {result['bytes'] / 1e6:.0f} MB"
        add(result, what, waits["asynchronous"], waits["synchronous"], "written in between steps", "s")
    return markdown(["", "here", "otherwise", "ratio", "on"], rows)


THEMES = (
    network, peer_step, step_parts, infonce, update, table3, plan_validation, loader, loader_parts, sources, parquet,
    index, exchange, augment, checkpoint, checkpoint_planning, demo_seeds, patches,
)  # fmt: skip
TABLES: dict[str, Callable[[Result], str]] = {table.__name__: table for table in THEMES}


def filled(page: str) -> str:
    """`page` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        texts = [headlines()] if name == "headlines" else [TABLES[name](result) for result in newest(name)]
        return match[1] + ("\n".join(texts) or "Not run yet.\n") + match[3]

    return MARKED.sub(table, page)


def main() -> None:
    """Rewrite the pages."""
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
