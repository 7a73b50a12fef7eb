"""What is worth measuring on a machine with one GPU and little time, in order of value: `make gpu`.

    python -m benchmarks.gpu [--minutes 9] [--only PART ...] [--again PART ...] [--record FILE] [--quick]

Each part is a process of its own with a time limit of its own; one that fails is recorded with its reason, and the next
one starts. A call stops before its minutes are over, and the next call goes on: a part with a result is not repeated
unless `--again` names it, one that failed is tried again after all others, and one that was cut goes on where it was
if it can. Three calls of nine minutes are about enough for all parts but the last one.

The record, runs/gpu.json by default, is written after each part. It holds what ran and all result files, so that this
file is enough to go on in another checkout, or to take the results home: `--minutes 0` measures nothing, writes the
results into benchmarks/results and prints the table. `--quick` tries every part in seconds, on a CPU too, and keeps
nothing.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NEEDED = {  # what the program imports: by the names that pip knows
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PIL": "pillow", "pydantic": "pydantic",
    "simplejpeg": "simplejpeg", "psutil": "psutil", "yaml": "pyyaml", "safetensors": "safetensors", "tqdm": "tqdm",
}  # fmt: skip
GRACE_SECONDS = 15  # for a part that was told to end
LEAST_SECONDS = 60  # with less left, a part that could go on is not started
BATCHES = ["32", "64", "128", "256"]  # of a rank
EXTREMES = [BATCHES[0], BATCHES[-1]]  # where launches, and where arithmetic takes the time: compiling takes minutes


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Attributes:
        name: for `--only`, `--again` and the table.
        words: after `python -m`.
        limit_seconds: after which it has failed; of all calls together if it goes on.
        goes_on: it keeps what it has when it is cut; `--earlier keep` takes that up, `--earlier replace` does not.
        why_not: says why it cannot be measured here, or None.
    """

    name: str
    words: list[str]
    limit_seconds: int
    goes_on: bool = False
    why_not: Callable[[], str | None] = lambda: None


def without(*packages: str) -> Callable[[], str | None]:
    """A reason if one of the packages is not installed."""

    def why_not() -> str | None:
        missing = [package for package in packages if find_spec(package) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    return why_not


def gpu_tests() -> list[str]:
    """Files with tests marked `gpu`: the others need packages that a bare machine lacks."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))
            if "@pytest.mark.gpu" in path.read_text()]  # fmt: skip


def parts(quick: bool = False) -> list[Part]:
    """In order of value."""
    workers = ["-n", "4"] if find_spec("xdist") and not quick else []
    # Another version of torch may warn of what ours does not.
    tests = ["pytest", "-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", *workers, *gpu_tests()]
    steps, compiled = ["benchmarks.step_parts", "--batches"], ["--ways", "compile", "graphs"]
    return [
        Part("tests", tests, 300, why_not=without("pytest", "pytest_timeout", "hypothesis")),
        Part("step", [*steps, *BATCHES, "--ways", "eager"], 240, goes_on=True),
        Part("lightly", ["benchmarks.peer_step", "--ranks", "1", "--rounds", "1", "--local-batches", *BATCHES], 360,
             why_not=without("lightly")),
        Part("step-compiled", [*steps, *EXTREMES, *compiled], 480, goes_on=True),
        Part("infonce", ["benchmarks.infonce"], 120),
        Part("augment", ["benchmarks.augment", "--views", "512"], 120),
        Part("update", ["benchmarks.update"], 120),
        Part("table3", ["benchmarks.table3"], 240, goes_on=True),
        Part("checkpoint", ["benchmarks.checkpoint"], 120),
        Part("loader", ["benchmarks.loader", "--rounds", "3"], 240),
        Part("step-compiled-rest", [*steps, *BATCHES, *compiled], 720, goes_on=True),
        Part("fashion-mnist", ["benchmarks.fashion_mnist"], 3600, goes_on=True),
    ]  # fmt: skip


class Record:
    """What ran, and its result files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}, "results": {}}
        for name, result in self._values["results"].items():
            file = RESULTS / Path(name).name
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(result, indent=1) + "\n")
        self._before = self._files()

    def part(self, name: str) -> dict[str, Any]:
        """What is known of a part: `status`, `seconds` of all its calls, `note`, `date`, the `end` of its output."""
        return self._values["parts"].get(name, {"status": "not run", "seconds": 0, "note": ""})

    def forget(self, name: str) -> None:
        """It is to be run anew."""
        self._values["parts"].pop(name, None)

    def keep(self, name: str, **facts: Any) -> None:
        """What happened to a part, and the result files that changed since the record was opened."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._values["parts"][name] = {**facts, "date": date}
        files = self._files()
        changed = {path.name: json.loads(text) for path, text in files.items() if self._before.get(path) != text}
        self._values["results"] |= changed
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._values, indent=1) + "\n")
        partial.replace(self._path)

    def _files(self) -> dict[Path, str]:
        return {path: path.read_text() for path in RESULTS.glob("*.json")}


def run(part: Part, record: Record, seconds: float, quick: bool, again: bool) -> None:
    """Run a part for at most so many seconds, and record how it ended."""
    spent = record.part(part.name)["seconds"]
    allowed = seconds if quick else min(part.limit_seconds - spent, seconds)
    words = [*part.words]
    if quick and part.words[0] != "pytest":
        words.append("--quick")
    if part.goes_on and not quick:
        words += ["--earlier", "replace" if again else "keep"]
    print(f"\n== {part.name}, at most {allowed:.0f} s: python -m {' '.join(words)}"[:300], flush=True)
    started = time.monotonic()
    with tempfile.NamedTemporaryFile("w+", errors="replace") as out:
        if quick and not has_gpu():
            status = tried(words, out.name)
        else:
            status = ended([sys.executable, "-m", *words], out, allowed)
        out.seek(0)
        text = out.read()
    print(text, flush=True)
    lines = [line.strip() for line in re.sub(r"[^\n]*\r", "", text).splitlines() if line.strip()] or ["no output"]
    spent += time.monotonic() - started
    state, note = "done", lines[-1]
    if status is None:
        over = spent >= part.limit_seconds - 1
        state, note = ("failed", f"longer than {part.limit_seconds} s") if over else ("cut", "the call was over")
    elif status:
        state, note = "failed", f"status {status}: {lines[-1]}"
    elif part.words[0] == "pytest" and " passed" not in lines[-1]:
        state = "left out"
    record.keep(part.name, status=state, seconds=round(spent, 1), note=note[:100], end=lines[-40:])


def ended(words: list[str], out: Any, seconds: float) -> int | None:
    """The status of a command, or None if it was cut: it and all that it started are gone then."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # a training saves a checkpoint
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def has_gpu() -> bool:
    """Whether torch sees one."""
    import torch

    return torch.cuda.is_available()


def tried(words: list[str], out: str) -> int:
    """The status of `python -m WORDS` in a fork of a process that has done nothing but the imports that take longest.

    A GPU could not be used in it: the fork of a process that has looked for one cannot.
    """
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["torch._dynamo", "torchvision", "moco_dist.method.build"])
    process = forked.Process(target=_run_module, args=(words, out))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run_module(words: list[str], out: str) -> None:
    file = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[:] = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def table(chosen: list[Part], record: Record) -> str:
    """What ran, what did not, and why."""
    rows = [["part", "status", "seconds", ""]]
    for part in chosen:
        known = record.part(part.name)
        rows.append([part.name, known["status"], f"{known['seconds']:.0f}", known["note"]])
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def main() -> int:
    """Run what there is time for; 1 if a part has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in parts()]
    parser.add_argument("--minutes", type=float, default=9, help="of this call (default 9)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="PART", help="repeat these")
    parser.add_argument("--record", type=Path, default=ROOT / "runs" / "gpu.json", help="default: runs/gpu.json")
    parser.add_argument("--quick", action="store_true", help="try every part in seconds; keeps nothing")
    args = parser.parse_args()
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        sys.exit(f"{sys.executable} lacks {', '.join(missing)}; docs/benchmarks.md says how to bring packages along")
    if not (args.quick or args.minutes == 0 or has_gpu()):
        sys.exit("no CUDA device here; --quick tries every part without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that parts are ended as well
    with tempfile.TemporaryDirectory() as scratch:
        record = Record(Path(scratch) / "gpu.json" if args.quick else args.record)
        chosen = [part for part in parts(args.quick) if part.name in args.only]
        for name in args.again:
            record.forget(name)
        if args.minutes:
            call(chosen, record, 60 * (60 if args.quick else args.minutes), args.quick, args.again)
        print(f"\n{table(chosen, record)}")
        if not args.quick:
            print("`python -m benchmarks.tables` puts the results into the pages")
        return int(any(record.part(part.name)["status"] == "failed" for part in chosen))


def call(chosen: list[Part], record: Record, seconds: float, quick: bool, again: list[str]) -> None:
    """Run the parts that have no result, those that failed before at the end, until the time is over."""
    deadline, tried_programs = time.monotonic() + seconds - GRACE_SECONDS, set()
    due = [part for part in chosen if record.part(part.name)["status"] != "done"]
    for part in sorted(due, key=lambda part: record.part(part.name)["status"] == "failed"):
        left = deadline - time.monotonic()
        reason = part.why_not()
        if quick and part.words[0] in tried_programs:  # which has one smallest form, whatever its words
            reason = "the same program as a part above"
        tried_programs.add(part.words[0])
        if reason:
            record.keep(part.name, status="left out", seconds=0, note=reason)
        elif left >= (LEAST_SECONDS if part.goes_on else part.limit_seconds / 2):
            if record.part(part.name)["status"] == "failed":
                record.forget(part.name)  # its time starts anew
            run(part, record, left, quick, part.name in again)


if __name__ == "__main__":
    sys.exit(main())
