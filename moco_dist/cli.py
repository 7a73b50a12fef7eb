"""The `moco-dist` command: parse, build, call."""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

from moco_dist import __version__
from moco_dist.config import KnnConfig, LinearConfig, PretrainConfig
from moco_dist.config_source import help_text, read_config
from moco_dist.errors import Preempted, UserError, nearest

EXIT_MISTAKE = 2  # a mistake in what the user gave
EXIT_INTERRUPTED = 130  # Ctrl-C
PEER_TIMEOUT_SECONDS = 60.0  # in evaluations; a pre-training has run.peer_timeout_seconds
SCHEMAS = {"pretrain": PretrainConfig, "knn": KnnConfig, "linear": LinearConfig}
DATASETS = ("shapes", "fashion-mnist", "cifar10", "imagefolder")

USAGE = """usage: moco-dist COMMAND ...

  pretrain [CONFIG.yaml] [--section.key VALUE ...]   pre-train an encoder by MoCo v2
  knn      [CONFIG.yaml] --run-dir DIR [--key VALUE ...] nearest-neighbour accuracy of what it learned
  linear   [CONFIG.yaml] --run-dir DIR [--key VALUE ...] linear evaluation of what it learned
  report   RUN_DIR                                   accuracy table, and a page with pictures and curves
  data prepare NAME --out DIR                        get or check a data set

moco-dist COMMAND --help shows every setting. On several GPUs or hosts: torchrun ... -m moco_dist COMMAND ...
--debug shows where an error came from; --version the version."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. A user's mistake is one line each, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    try:
        return _dispatch(argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        who = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f"[rank {rank}] "
        for line in str(error).splitlines():
            print(f"{who}error: {line}", file=sys.stderr)
        return error.exit_status
    except Preempted as notice:
        if os.environ.get("RANK", "0") == "0":
            print(notice, file=sys.stderr)
        return notice.exit_status
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; a pre-training goes on from its newest checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else EXIT_MISTAKE
    if argv[0] == "--version":
        print(__version__)
        return 0
    command, rest = argv[0], argv[1:]
    if command in SCHEMAS:
        return _configured(command, rest)
    if command == "report":
        return _report(rest)
    if command == "data":
        return _data(rest)
    raise UserError(
        f"unknown command {command!r}; {', '.join(SCHEMAS)}, report and data are{nearest(command, SCHEMAS)}"
    )


def _configured(command: str, rest: list[str]) -> int:
    """`pretrain`, `knn` and `linear`: a YAML file and flags, on one process or under torchrun."""
    schema = SCHEMAS[command]
    if "-h" in rest or "--help" in rest:
        print(f"usage: moco-dist {command} [CONFIG.yaml] [--section.key VALUE ...]\n\n{schema.__doc__}\n")
        print(help_text(schema))
        return 0
    path = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    config = read_config(schema, path, rest)

    # torch and everything that needs it: imported once the flags are known to be right.
    from moco_dist import train
    from moco_dist.distributed.collectives import process_group
    from moco_dist.distributed.heartbeat import Heartbeat
    from moco_dist.distributed.world import world_from_env
    from moco_dist.evaluate.knn import run_knn
    from moco_dist.evaluate.linear import run_linear
    from moco_dist.tracking import Tracker

    signal.signal(signal.SIGTERM, _terminate)  # a pre-training has its own way: it saves first
    is_pretraining = isinstance(config, PretrainConfig)
    world = world_from_env(config.run.device if is_pretraining else config.device)
    silence_seconds = config.run.peer_timeout_seconds if is_pretraining else PEER_TIMEOUT_SECONDS
    with process_group(world), Heartbeat(world, silence_seconds):
        if isinstance(config, PretrainConfig):
            with Tracker.for_pretraining(config, world) as tracker:
                last = train.pretrain(config, world, tracker)
            if world.is_main:
                print(f"done: {last}")
            return 0
        results = run_knn(config, world) if isinstance(config, KnnConfig) else run_linear(config, world)
        if world.is_main:
            for result in results:
                accuracies = "  ".join(f"{name} {value:.2f} %" for name, value in result["accuracy"].items())
                print(f"{result['encoder']}: {accuracies}")
                with Tracker.for_evaluation(config, command, result["encoder"]) as tracker:
                    tracker.log_metrics(result["step"], result["accuracy"])
    return 0


def _report(rest: list[str]) -> int:
    parser = argparse.ArgumentParser("moco-dist report", description="accuracy table, pictures and curves of a run")
    parser.add_argument("run", type=Path, help="folder of the pre-training run")
    run_dir = parser.parse_args(rest).run
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not the folder of a run: it has no config.yaml")

    from moco_dist.data.views import view_pairs
    from moco_dist.evaluate.knn import nearest_examples
    from moco_dist.report import accuracy_table, write_report
    from moco_dist.tracking import Tracker, ui_command

    config = read_config(PretrainConfig, run_dir / "config.yaml", [])
    page = write_report(run_dir, view_pairs(config, 8), nearest_examples(run_dir))
    with Tracker.reopen(run_dir) as tracker:
        tracker.log_artifact(page, "report")
    print(accuracy_table(run_dir))
    print(f"\nreport: {page}\nMLflow: {ui_command(run_dir)}")
    return 0


def _data(rest: list[str]) -> int:
    parser = argparse.ArgumentParser("moco-dist data", description="get or check a data set")
    prepare = parser.add_subparsers(dest="action", required=True).add_parser("prepare")
    prepare.add_argument("name", help=f"one of {', '.join(DATASETS)}")
    prepare.add_argument("--out", type=Path, required=True, help="folder to write: OUT/train and OUT/val")
    prepare.add_argument("--source", type=Path, help="fashion-mnist: folder of its .gz files; imagefolder: the images")
    args = parser.parse_args(rest)
    if args.name not in DATASETS:
        raise UserError(f"unknown data set {args.name!r}; {', '.join(DATASETS)} are{nearest(args.name, DATASETS)}")

    from moco_dist.data import prepare as data_sets

    if args.name == "shapes":
        data_sets.prepare_shapes(args.out)
    elif args.name == "fashion-mnist":
        data_sets.prepare_fashion_mnist(args.out, args.source)
    elif args.name == "cifar10":
        data_sets.prepare_cifar10(args.out)
    elif args.source is None:
        raise UserError("data prepare imagefolder needs --source, the folder of class folders to check")
    else:
        data_sets.prepare_imagefolder(args.out, args.source)
    return 0


def _terminate(signum: int, frame: object) -> None:
    """SIGTERM, from a scheduler or torchrun, ends a run as Ctrl-C does."""
    raise KeyboardInterrupt
