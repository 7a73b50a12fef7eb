"""Where results go, and what they must say: hardware, versions, date, command."""

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from moco_dist.provenance import hardware, package_versions

FOLDER = Path(__file__).parent / "results"


def write(theme: str, rows: list[dict[str, Any]], device: str = "cpu", **facts: Any) -> Path:
    """Write results/THEME_HARDWARE_DATE.json; returns its path.

    Args:
        theme: what was measured: the script's name.
        rows: the measurements.
        device: where it was measured, `cpu` or `cuda`, whatever else the machine has.
        facts: what else a reader needs to understand them.
    """
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
    cpu = f"{len(os.sched_getaffinity(0))}cores"
    name = cpu if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{theme}_{device}-{name}_{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    return path
