"""`moco-dist demo` (`make demo`): the main job in minutes on two cores, from images to a table of what was learned."""

import os
import sys
import time
from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.errors import EXIT_INTERRUPTED
from moco_dist.run.folder import RunFolder

RUN = Path("runs/demo")
DATA = Path("data/shapes")
RANKS = 2


def main(words: list[str]) -> int:
    """Prepare, pre-train, evaluate, report; stops at the first step that fails, with its exit status."""
    Parser("moco-dist demo", description="pre-trains on generated shapes and evaluates, on two ranks").parse_args(words)

    from moco_dist.cli import data, report
    from moco_dist.launchers.torchrun import torchrun

    def ranks(command: list[str]) -> int:
        return torchrun(["--standalone", "--nproc-per-node", str(RANKS), "-m", "moco_dist", *command])

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // RANKS)))
    encoders = ["--encoders", "[pixels, untrained, trained]", "--data.num-workers", "0"]
    steps = [
        ("1/4  data", lambda: data.main(["prepare", "shapes", "--out", str(DATA)])),
        ("2/4  pre-training on 2 ranks", lambda: ranks(["pretrain", "demo.yaml"])),
        ("3/4  kNN", lambda: ranks(["knn", "--run-dir", str(RUN), *encoders])),
        ("3/4  linear", lambda: ranks(["linear", "demo_linear.yaml", *encoders])),
        ("4/4  report", lambda: report.main([str(RUN)])),
    ]
    started = time.monotonic()
    for title, step in steps:
        print(f"\n== {title}", flush=True)
        if title.startswith("2/4"):
            page = RunFolder(RUN).report
            print(f"{page} appears in the first minutes and loads itself again: open it in a browser", flush=True)
        try:
            status = step()
        except KeyboardInterrupt:
            status = EXIT_INTERRUPTED
        if status:
            print(f"demo stopped in step {title!r}; run it again to go on", file=sys.stderr)
            return status
    print(f"\n{time.monotonic() - started:.0f} seconds in all")
    return 0
