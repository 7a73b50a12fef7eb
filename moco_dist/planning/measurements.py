"""Measured parts of a step: where they are kept, and which of them speak about a planned run.

A file is JSON with `theme: calibration` and says what every result of benchmarks/ says: hardware, versions, date,
command. A measurement counts only for the very settings that its time depends on; nothing is scaled from others.
Where no calibration has timed the loader, a result of benchmarks/loader.py stands in, with its own images named.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import declarations, flatten
from moco_dist.errors import UserError, nearest
from moco_dist.files import parsed_json

THEME = "calibration"


@dataclass(frozen=True)
class Measurement:
    """One calibration: medians over its steps.

    Attributes:
        hardware: processor or GPU.
        date: ISO.
        path: of the file.
        settings: those of the config it was made with that a time depends on, by their dotted names.
        local_batch: samples of a rank.
        world_size: ranks that were measured at the same time; num_nodes: on how many hosts.
        parts: seconds of a step by part; `step` is the whole of it, without network and without waiting for data.
        peak_bytes: of the GPU's memory; 0 on a CPU.
        loader_core_seconds: CPU seconds to decode and crop a rank's batch for `loader_world_size`; None: no data here.
        all_reduce_bytes, all_reduce_seconds: of the gradients; 0 with one rank.
        latency_seconds: of a collective of a few bytes.
    """

    hardware: str
    date: str
    settings: dict[str, Any]
    local_batch: int
    world_size: int
    num_nodes: int
    parts: dict[str, float]
    peak_bytes: int
    loader_core_seconds: float | None
    loader_world_size: int
    all_reduce_bytes: int
    all_reduce_seconds: float
    latency_seconds: float
    path: str = ""

    @property
    def source(self) -> str:
        """Where it comes from, for a person."""
        return f"measured {self.date} on {self.hardware} ({self.path or 'this calibration'})"

    @property
    def ring_bytes_per_second(self) -> float | None:
        """What a link of the ring carried during the all-reduce of the gradients; None with one rank."""
        if self.world_size == 1:
            return None
        return 2 * (self.world_size - 1) / self.world_size * self.all_reduce_bytes / self.all_reduce_seconds


@dataclass(frozen=True)
class CoreSeconds:
    """CPU seconds of one core, and where they come from, for a person."""

    seconds: float
    source: str


def settings_of(config: PretrainConfig) -> dict[str, Any]:
    """The settings that times depend on, as plain values by their dotted names."""
    flat = flatten(config)
    return {name: flat[name] for name, setting in declarations(PretrainConfig).items() if setting["times"]}


def folders() -> list[Path]:
    """Where a plan looks: the user's cache, where calibrations are kept, and a checkout's benchmarks/results."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [cache / "moco_dist", Path(__file__).parents[2] / "benchmarks" / "results"]


def write(measured: Measurement, versions: dict[str, str], command: str, folder: Path) -> Path:
    """Write calibration_HARDWARE_DATE_N.json."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join("".join(c if c.isalnum() else " " for c in measured.hardware.lower()).split())
    number = len(list(folder.glob(f"{THEME}_*.json")))
    path = folder / f"{THEME}_{name}_{measured.date}_{number}.json"
    row = asdict(measured)
    facts = {"theme": THEME, "date": row.pop("date"), "hardware": row.pop("hardware"), "versions": versions,
             "command": command}  # fmt: skip
    row.pop("path")
    path.write_text(json.dumps({**facts, "rows": [row]}, indent=1) + "\n", encoding="utf-8")
    return path


def read(where: list[Path]) -> list[Measurement]:
    """All calibrations in these folders, oldest first.

    Raises:
        UserError: a file is damaged.
    """
    found = []
    for path in sorted(path for folder in where for path in folder.glob(f"{THEME}_*.json")):
        try:
            result = parsed_json(path.read_text(encoding="utf-8"))
            found += [
                Measurement(
                    hardware=result["hardware"],
                    date=result["date"],
                    path=str(path),
                    **{**row, "settings": _flat(row["settings"])},
                )
                for row in result["rows"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a calibration: {error}; remove it, and run with --calibrate") from error
    return sorted(found, key=lambda measured: measured.date)


def benchmark_of_loader(where: list[Path], config: PretrainConfig) -> CoreSeconds | None:
    """Seconds a file, by the newest result of benchmarks/loader.py for this loader and size of crops; None: no result.

    Raises:
        UserError: a file is damaged.
    """
    data, found = config.data, []
    row_name = {
        "torchvision": "loader torchvision",
        "ffcv": "loader ffcv, JPEGs",
        "dali": f"loader dali, decoding on the {data.dali.decode_on.upper()}",
    }[data.loader]
    for path in sorted(path for folder in where for path in folder.glob("loader_*.json")):
        try:
            result = parsed_json(path.read_text(encoding="utf-8"))
            if result.get("theme", "loader") != "loader":  # a benchmark whose name only begins so
                continue
            milliseconds = {row["name"]: row["cpu_ms_per_image"] for row in result["rows"]}.get(row_name)
            if result["crop_size"] == data.image_size and milliseconds is not None:
                width, height = result["image_size"]
                source = (f"measured {result['date']} on {result['hardware']} ({path}): files of {width} x {height} px "
                          f"and {result['mean_file_bytes'] / 1000:.0f} kB, two crops of each")  # fmt: skip
                found.append((result["date"], CoreSeconds(milliseconds / 1000, source)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a result of benchmarks/loader.py: {error}; remove it") from error
    return max(found, key=lambda dated: dated[0])[1] if found else None


def of_gpu(measurements: list[Measurement], gpu: str | None) -> list[Measurement]:
    """The measurements whose hardware's name has `gpu` in it, without regard to case; None: of any hardware."""
    return [m for m in measurements if gpu is None or gpu.lower() in m.hardware.lower()]


def for_step(measurements: list[Measurement], config: PretrainConfig, local_batch: int) -> Measurement | None:
    """The newest measurement of this very step; of one day's, the one on the most ranks, since ranks contend."""
    fitting = [m for m in measurements if m.local_batch == local_batch and _is_of(m, config, "step")]
    return max(fitting, key=lambda m: (m.date, m.world_size), default=None)


def for_loader(
    measurements: list[Measurement], config: PretrainConfig, local_batch: int, world_size: int
) -> Measurement | None:
    """The newest measurement that loaded this very share of a batch."""
    fitting = [m for m in measurements
               if m.loader_core_seconds is not None and m.loader_world_size == world_size
               and m.local_batch == local_batch and _is_of(m, config, "loader")]  # fmt: skip
    return fitting[-1] if fitting else None


def _is_of(measured: Measurement, config: PretrainConfig, part: str) -> bool:
    """Whether all settings that this part's time depends on had the values that `config` has."""
    settings = declarations(PretrainConfig)
    return all(measured.settings.get(name) == value for name, value in settings_of(config).items()
               if part in settings[name]["times"])  # fmt: skip


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings by dotted names. Files of version 0.1 have whole sections under the section's name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def for_network(measurements: list[Measurement], num_nodes: int) -> Measurement | None:
    """The newest measurement of an all-reduce on one host, or between hosts, as the planned run does it."""
    fitting = [m for m in measurements if m.world_size > 1 and (m.num_nodes > 1) == (num_nodes > 1)]
    return fitting[-1] if fitting else None


def missing(measurements: list[Measurement], gpu: str | None) -> str:
    """What to say in place of a number."""
    known = sorted({m.hardware for m in measurements})
    if gpu and not of_gpu(measurements, gpu):
        hint = f" (measured are: {'; '.join(known)}{nearest(gpu, known)})" if known else ""
        return f"not measured on {gpu}{hint}: run with --calibrate there"
    return "not measured with these settings: run with --calibrate"
