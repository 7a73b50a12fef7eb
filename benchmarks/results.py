"""Where results go, and what they must say: hardware, versions, date, command; and `--quick`, which writes none."""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from moco_dist.provenance import hardware, package_versions

FOLDER = Path(__file__).parent / "results"
QUICK = "--quick"


def parse(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The command line's arguments. With `--quick` those of `quick` replace the user's, and `write` writes nothing.

    Every benchmark is parsed here, so that a test can try each of them in seconds.
    """
    parser.add_argument(QUICK, action="store_true", help="try it in seconds, with the smallest sizes; writes no result")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(quick)
    return args


def add_earlier(parser: argparse.ArgumentParser) -> None:
    """`--earlier`, of a benchmark that writes its rows as it goes and can be cut."""
    parser.add_argument("--earlier", choices=("drop", "keep", "replace"), default="drop",
                        help="rows of the newest result of this hardware: keep them and measure what is missing, or "
                        "replace those that are measured now and keep the others (default drop)")  # fmt: skip


def earlier_rows(theme: str, device: str, **facts: Any) -> list[dict[str, Any]]:
    """Rows of the newest result of this kind of machine, if its hardware, versions and these facts are those of now."""
    found = sorted(FOLDER.glob(f"{_stem(theme, device)}_*.json"))
    result = json.loads(found[-1].read_text()) if found and QUICK not in sys.argv else {}
    same = {"hardware": hardware(device), "versions": package_versions(), **facts}
    return result["rows"] if result and all(result.get(key) == value for key, value in same.items()) else []


def write(theme: str, rows: list[dict[str, Any]], device: str = "cpu", **facts: Any) -> None:
    """Write results/THEME_HARDWARE_DATE.json.

    Args:
        theme: what was measured: the script's name.
        rows: the measurements.
        device: where it was measured, `cpu` or `cuda`, whatever else the machine has.
        facts: what else a reader needs to understand them.
    """
    if QUICK in sys.argv:
        return
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {
        "theme": theme,
        "date": date,
        "hardware": hardware(device),
        "device": device,
        "versions": package_versions(),
        "command": f"python -m benchmarks.{theme} {' '.join(sys.argv[1:])}".strip(),
        **facts,
        "rows": rows,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{_stem(theme, device)}_{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def _stem(theme: str, device: str) -> str:
    cpu = f"{len(os.sched_getaffinity(0))}cores"
    name = cpu if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"{theme}_{device}-{name}"
