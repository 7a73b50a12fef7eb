"""How much of the demo's table is chance: `moco-dist demo` with several seeds, over the same images.

    python -m benchmarks.demo_seeds [--seeds 0 1 2 3 4] [--instructions own avx2]
        [--earlier drop|keep|replace] [--quick]

Each demo runs in a folder of its own, with a demo.yaml that differs by run.seed alone. `own` is every instruction that
the CPU has; `avx2` is ATEN_CPU_CAPABILITY=avx2 and DNNL_MAX_CPU_ISA=AVX2, under which the kernels round otherwise, and
so a run is another one. A result is written after each demo. --quick: a seed of an epoch on a few shapes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import results
from moco_dist.datasets.prepare import MARKER, prepare_shapes

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {"own": {}, "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2"}}
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"
SMALL: dict[str, dict[str, Any]] = {  # goes over the demo's settings
    "demo": {"model": {"head_hidden_dims": [16], "bn_group_size": 4}, "moco": {"queue_size": 64},
             "optim": {"global_batch_size": 24, "epochs": 1, "warmup_epochs": 0}},
    "demo_linear": {"epochs": 1, "milestones": [], "global_batch_size": 8},
}  # fmt: skip


def merged(settings: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`settings` with those of `over` in their place, section by section."""
    return {**settings, **{key: {**settings.get(key, {}), **value} if isinstance(value, dict) else value
                           for key, value in over.items()}}  # fmt: skip


def settings_of(quick: bool) -> dict[str, dict[str, Any]]:
    """The demo's settings, by the names of their files."""
    files = {name: yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in SMALL}
    return {name: merged(given, SMALL[name]) if quick else given for name, given in files.items()}


def prepared(data: Path, quick: bool) -> float:
    """Make the demo's images, for --quick few of them, which the demo takes for all; returns CPU seconds."""
    before = time.process_time()
    if not quick:
        prepare_shapes(data)
        return time.process_time() - before
    marker = prepare_shapes(data, num_train=240, num_val=40) / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "num_train": 8_000, "num_val": 2_000}))
    return time.process_time() - before


def measured(folder: Path, data: Path, settings: dict[str, dict[str, Any]], seed: int, under: str) -> dict[str, Any]:
    """A demo in `folder`, which is made: the row of a result; accuracies are in percent.

    The images are there already. CPU seconds are those of all its processes: they hardly depend on what else runs.
    """
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "shapes").symlink_to(data)
    for name, given in settings.items():
        given = merged(given, {"run": {"seed": seed}}) if name == "demo" else given
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(given))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, **INSTRUCTIONS[under]}
    capability = subprocess.run([sys.executable, "-c", CAPABILITY], env=env, check=True, capture_output=True, text=True)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "moco_dist", "demo"], cwd=folder, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.returncode)
    row = {"instructions": under, "capability": capability.stdout.strip(), "seed": seed}
    for path in sorted((folder / "runs" / "demo" / "eval").glob("*.json")):
        found = json.loads(path.read_text())
        name = {"knn": "knn_top1_k20", "linear": "linear_top1"}.get(path.stem.partition("_")[0])
        if name and "accuracy" in found:
            row[path.stem] = found["accuracy"][name]
    row["seconds"] = time.perf_counter() - started
    row["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return row


def main() -> None:
    """Measure, and write the results file after each demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--instructions", nargs="+", choices=list(INSTRUCTIONS), default=list(INSTRUCTIONS))
    results.add_earlier(parser)
    args = results.parse(parser, seeds=[0], instructions=["own"])
    settings = settings_of(args.quick)
    rows = [] if args.earlier == "drop" else results.earlier_rows("demo_seeds", "cpu", settings=settings)
    wanted = [(under, seed) for under in args.instructions for seed in args.seeds]
    if args.earlier == "replace":
        rows = [row for row in rows if (row["instructions"], row["seed"]) not in wanted]
    known = {(row["instructions"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "shapes"
        data_cpu_seconds = prepared(data, args.quick)
        for under, seed in wanted:
            if (under, seed) in known:
                continue
            row = measured(Path(scratch) / f"{under}_{seed}", data, settings, seed, under)
            rows.append({**row, "data_cpu_seconds": data_cpu_seconds})
            print(json.dumps(rows[-1]), flush=True)
            results.write("demo_seeds", rows, settings=settings)


if __name__ == "__main__":
    main()
