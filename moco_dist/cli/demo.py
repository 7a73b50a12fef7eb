"""`moco-dist demo` (`make demo`): the main job in minutes on two cores, from images to a table of what was learned.

A first table and page are there before the training begins: raw pixels and the network untrained need none.
"""

import json
import os
import sys
import time
from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.errors import EXIT_INTERRUPTED
from moco_dist.run.folder import RunFolder

CONFIG, LINEAR = "demo.yaml", "demo_linear.yaml"
RUN = Path("runs/demo")
DATA = Path("data/shapes")
RANKS = 2


def main(words: list[str]) -> int:
    """Prepare, pre-train, evaluate, report; stops at the first step that fails, with its exit status."""
    Parser("moco-dist demo", description="pre-trains on generated shapes and evaluates, on two ranks").parse_args(words)

    from moco_dist.cli import data, report
    from moco_dist.config.evaluate import LinearConfig
    from moco_dist.config.source import read_config
    from moco_dist.launchers.torchrun import torchrun

    def ranks(command: list[str]) -> int:
        return torchrun(["--standalone", "--nproc-per-node", str(RANKS), "-m", "moco_dist", *command])

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // RANKS)))
    encoders = ["--encoders", "[pixels, untrained, trained]"]
    size = json.dumps(read_config(LinearConfig, Path(LINEAR), []).data.image_size)  # kNN sees what linear sees
    knn = ["knn", "--run-dir", str(RUN), "--data.num-workers", "0", "--data.image-size", size]

    def before_training() -> int:
        run = RunFolder(RUN)
        _begin(run)
        if status := ranks([*knn, "--encoders", "[pixels, untrained]"]):
            return status
        _first_page(run)
        return 0

    steps = [
        ("1/5  data", lambda: data.main(["prepare", "shapes", "--out", str(DATA)])),
        ("2/5  kNN before training", before_training),
        ("3/5  pre-training on 2 ranks", lambda: ranks(["pretrain", CONFIG])),
        ("4/5  kNN", lambda: ranks([*knn, *encoders])),
        ("4/5  linear", lambda: ranks(["linear", LINEAR, *encoders])),
        ("5/5  report", lambda: report.main([str(RUN)])),
    ]
    started = time.monotonic()
    for title, step in steps:
        print(f"\n== {title}", flush=True)
        try:
            status = step()
        except KeyboardInterrupt:
            status = EXIT_INTERRUPTED
        if status:
            print(f"demo stopped in step {title!r}; run it again to go on", file=sys.stderr)
            return status
    print(f"\n{time.monotonic() - started:.0f} seconds in all")
    return 0


def _begin(run: RunFolder) -> None:
    """`run` is the folder of a run from now on, so that it can be evaluated and shown."""
    from moco_dist.config.pretrain import PretrainConfig
    from moco_dist.config.source import read_config, to_yaml
    from moco_dist.run.manifest import without_secrets

    if not run.config.exists():
        run.root.mkdir(parents=True, exist_ok=True)
        run.config.write_text(to_yaml(without_secrets(read_config(PretrainConfig, Path(CONFIG), []))))


def _first_page(run: RunFolder) -> None:
    """The table and the page of what is known so far; the training makes the page anew as it goes on."""
    from moco_dist.report.contact_sheet import pairs_for_report
    from moco_dist.report.page import accuracy_table, write_report

    page = write_report(run.root, pairs_for_report(run.settings(), 8, run.indices))
    opens = f"python -m webbrowser {page.resolve().as_uri()}"
    print(f"{accuracy_table(run.root)}\n\nto see the report, which grows as the demo goes on: {opens}", flush=True)
