"""The `moco-dist` command: finds the module of a command, and turns mistakes into lines."""

import atexit
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from typing import NoReturn

from moco_dist.cli.streams import let_lines_be_lost, open_closed_descriptors
from moco_dist.config.credentials import redacted_output
from moco_dist.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_MISTAKE,
    EXIT_PIPE,
    Preempted,
    SaidElsewhere,
    UserError,
    in_a_line,
    nearest,
)
from moco_dist.provenance import __version__

COMMANDS = {  # name: what it does, the function in moco_dist.cli; in the order of use
    "data": ("get, check, look at or pack a data set", "data:main"),
    "doctor": ("what is wrong with a machine, a config or a run", "doctor:main"),
    "plan": ("memory, network and hours of a run, before it starts", "plan:main"),
    "configs": ("the configs that come with it, by name", "configs:main"),
    "pretrain": ("pre-train an encoder by MoCo v2; again: go on", "pretrain:main"),
    "launch": ("the same by torchrun, Slurm or Kubernetes", "launch:main"),
    "knn": ("nearest-neighbour accuracy of a run", "evaluate:knn"),
    "linear": ("linear evaluation of a run", "evaluate:linear"),
    "finetune": ("train a run's whole network further, with labels", "evaluate:finetune"),
    "detect": ("object detection by a run's backbone", "detect:main"),
    "features": ("features of any images, into a file", "features:main"),
    "report": ("a page of a run: accuracies, curves, pictures", "report:main"),
    "compare": ("several runs side by side; registers the best", "compare:main"),
    "export": ("weights for torchvision, timm, detectron2", "weights:export"),
    "import": ("a backbone of another program, to evaluate", "weights:import_"),
    "sync": ("deliver to MLflow what it has missed", "sync:main"),
    "demo": ("the main job on generated images, in minutes on two cores", "demo:main"),
    "reproduce": ("the paper's tables, beside what was published", "reproduce:main"),
}
# These print for a person alone; what they are started for is done elsewhere, or lies in files.
RESULTS_ARE_FILES = {"pretrain", "launch", "knn", "linear", "finetune", "detect", "features", "demo", "reproduce",
                     "report", "compare", "export", "import", "sync",
                     "data prepare", "data pack", "data views"}  # fmt: skip
FOOTER = """
moco-dist COMMAND --help shows every setting.
On several GPUs: torchrun --nproc-per-node N -m moco_dist COMMAND ...
--debug shows where an error came from; --version the version."""


def command() -> NoReturn:
    """`moco-dist`, as a process: `main`, and an end that does not take apart all that torch has brought, for a second.

    Where a GPU was used Python ends in its own way: profilers of CUDA write then what they have seen. So it does after
    an error: torchrun ends the other ranks as soon as one has failed, and they may be about to say the same.
    """
    status = main()
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    if status or "torch" not in sys.modules or _has_used_cuda() or not all(thread.daemon for thread in others):
        raise SystemExit(status)
    atexit._run_exitfuncs()
    _end(status)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. A user's mistake is one line each, without a traceback.

    Whatever is printed meanwhile, by a library too, goes without passwords and tokens.

    A rank that fails among others ends here, at once: what torch and NCCL do at the end of a process waits for the
    others, and they sit in a collective that this one will never join.
    """
    argv = sys.argv[1:] if argv is None else argv
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Read when torch is loaded. Its warnings are of sockets, with a trace of 30 lines for each one that closes.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    open_closed_descriptors()
    let_lines_be_lost("stderr")
    if {" ".join(argv[:count]) for count in (1, 2)} & RESULTS_ARE_FILES and not {"-h", "--help", "--dry-run"} & {*argv}:
        let_lines_be_lost("stdout")
    with redacted_output():
        try:
            status = _run(argv)
        except Exception:
            if not _is_among_ranks():
                raise
            traceback.print_exc()
            status = EXIT_FAILURE
    if status and _is_among_ranks():
        _end(status)
    return status


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv
    who = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f"[rank {os.environ.get('RANK', '0')}] "
    # The deepspeed launcher says the local rank by a flag too.
    argv = [word for word in argv if word != "--debug" and not word.startswith("--local_rank=")]
    signal.signal(signal.SIGTERM, _terminate)  # a pre-training has its own way: it saves first
    try:
        status = _dispatch(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # what reads the output, `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except SaidElsewhere as error:
        return error.exit_status
    except UserError as error:
        if debug:
            traceback.print_exc()
        for line in str(error).splitlines():
            print(f"{who}error: {in_a_line(line)}", file=sys.stderr)
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


def _is_among_ranks() -> bool:
    """Whether this process has a process group that nothing has ended."""
    return "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()


def _has_used_cuda() -> bool:
    return "torch.cuda" in sys.modules and sys.modules["torch.cuda"].is_initialized()


def _end(status: int) -> NoReturn:
    """End this process at once."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<10} {text}" for name, (text, _) in COMMANDS.items()]
        print("\n".join(["usage: moco-dist COMMAND ...", "", *lines, FOOTER]))
        return 0 if argv else EXIT_MISTAKE
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; {', '.join(COMMANDS)} are{nearest(argv[0], COMMANDS)}")
    module, function = COMMANDS[argv[0]][1].split(":")
    return getattr(importlib.import_module(f"moco_dist.cli.{module}"), function)(argv[1:])


def _terminate(signum: int, frame: object) -> None:
    """SIGTERM, from a scheduler or torchrun, ends a run as Ctrl-C does."""
    raise KeyboardInterrupt
