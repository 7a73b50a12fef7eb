"""The `moco-dist` command: finds the module of a command, and turns mistakes into lines."""

import importlib
import os
import signal
import sys
import traceback

from moco_dist import __version__
from moco_dist.errors import Preempted, UserError, nearest

EXIT_MISTAKE = 2  # a mistake in what the user gave
EXIT_IO = 74  # EX_IOERR: a file cannot be read or written
EXIT_INTERRUPTED = 130  # Ctrl-C

COMMANDS = {  # name: its arguments, what it does, the function in moco_dist.commands
    "pretrain": ("[CONFIG.yaml ...] [--section.key VALUE ...]", "pre-train an encoder by MoCo v2", "pretrain:main"),
    "knn": ("[CONFIG.yaml ...] --run-dir DIR [--key VALUE ...]", "nearest-neighbour accuracy of a run", "evaluate:knn"),
    "linear": ("[CONFIG.yaml ...] --run-dir DIR [--key VALUE ...]", "linear evaluation of a run", "evaluate:linear"),
    "finetune": ("[CONFIG.yaml ...] --run-dir DIR [--key VALUE ...]", "its network, trained further with labels",
                 "evaluate:finetune"),
    "detect": ("CONFIG.yaml ... --run-dir DIR [--key VALUE ...]", "detection by a run's backbone (VOC)", "detect:main"),
    "report": ("RUN_DIR", "accuracy table, and a page with pictures and curves", "report:main"),
    "reproduce": ("TABLE [--scale full|small] [--launcher WHERE]", "the paper's tables, beside what was published",
                  "reproduce:main"),
    "compare": ("RUN_DIR ... | --experiment NAME", "several runs side by side; registers the best", "compare:main"),
    "export": ("RUN_DIR --format FORMAT --out FILE", "weights for torchvision, timm, detectron2", "weights:export"),
    "import": ("FILE --arch ARCH --out RUN_DIR", "a backbone of another program, to evaluate", "weights:import_"),
    "sync": ("RUN_DIR", "deliver to MLflow what it has missed", "sync:main"),
    "plan": ("[CONFIG.yaml ...] --nodes N --gpus-per-node G", "memory, network, hours, before a run", "plan:main"),
    "doctor": ("[CONFIG.yaml ...] | --run DIR", "what is wrong with a machine, a config or a run", "doctor:main"),
    "launch": ("local|torchrun|slurm|kubernetes CONFIG.yaml ...", "start it where it should run", "launch:main"),
    "data": ("prepare | verify | views | pack ...", "get, check, look at or pack a data set", "data:main"),
}
FOOTER = """
moco-dist COMMAND --help shows every setting. On several GPUs or hosts: torchrun ... -m moco_dist COMMAND ...
--debug shows where an error came from; --version the version."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. A user's mistake is one line each, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    who = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f"[rank {os.environ.get('RANK', '0')}] "
    # The deepspeed launcher says the local rank by a flag too.
    argv = [word for word in argv if word != "--debug" and not word.startswith("--local_rank=")]
    signal.signal(signal.SIGTERM, _terminate)  # a pre-training has its own way: it saves first
    try:
        return _dispatch(argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        for line in str(error).splitlines():
            print(f"{who}error: {line}", file=sys.stderr)
        return error.exit_status
    except OSError as error:  # no space, no permission, an input that is gone
        if debug or error.strerror is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"{who}error: {error.strerror.lower()}{where}; --debug shows where it came from", file=sys.stderr)
        return EXIT_IO
    except Preempted as notice:
        if os.environ.get("RANK", "0") == "0":
            print(notice, file=sys.stderr)
        return notice.exit_status
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"  {name} {arguments}".ljust(56) + f" {text}" for name, (arguments, text, _) in COMMANDS.items()]
        print("\n".join(["usage: moco-dist COMMAND ...", "", *lines, FOOTER]))
        return 0 if argv else EXIT_MISTAKE
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; {', '.join(COMMANDS)} are{nearest(argv[0], COMMANDS)}")
    module, function = COMMANDS[argv[0]][2].split(":")
    return getattr(importlib.import_module(f"moco_dist.commands.{module}"), function)(argv[1:])


def _terminate(signum: int, frame: object) -> None:
    """SIGTERM, from a scheduler or torchrun, ends a run as Ctrl-C does."""
    raise KeyboardInterrupt
