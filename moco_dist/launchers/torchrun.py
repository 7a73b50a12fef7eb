"""torchrun that speaks to people and to schedulers: `python -m moco_dist.launchers.torchrun` takes torchrun's words.

Two things differ. It exits with the exit status that tells why its ranks ended (75: saved and preempted; 69: a rank or
another host is lost; 2: a mistake), where torchrun exits with 1 whatever happened, so that a Slurm script or a
Kubernetes policy can tell a run that should be started again from one that would fail again. And what keeps hosts from
meeting, or has killed a rank, is one line on the host where it is, in place of a traceback.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from moco_dist.errors import (
    CAUSES,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_UNREACHABLE,
    UnreachableError,
    UserError,
    cause,
    nearest,
)

SHUTDOWN_SECONDS = 90  # what ranks have to save in after a SIGTERM, of the 120 that schedulers give
TELL_AFTER_SECONDS = 10
STUCK_SECONDS = 10  # torchrun looks at its ranks ten times a second
PROBE_SECONDS = 20.0  # a store that many hosts come to at once may be slow
# What usually sends the signals that end a rank.
SENDERS: dict[int, str] = {
    signal.SIGKILL: "usually by the out-of-memory killer (the kernel's log says so) or by a scheduler whose limit of "
    "memory or time is reached",
    signal.SIGABRT: "usually by NCCL's watchdog: another rank is lost, or a collective took too long",
    signal.SIGBUS: "usually since /dev/shm is full, or a file that is mapped has become shorter",
    signal.SIGSEGV: "usually a fault in a compiled library or a driver",
}
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def torchrun(words: list[str]) -> int:
    """Run torchrun with `words` in this process; returns the exit status. The ranks speak for themselves.

    `--status-folder FOLDER` is this program's own: there this host leaves HOST.started as it starts, and its status in
    HOST as it ends, so that whoever started several knows when a signal reaches them all, and can tell the cause of an
    end from its consequences.
    """
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read when torch is loaded: no warning for every retry
    from torch.distributed.run import get_args_parser

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the ranks have a level of their own
    # Where a worker shares torchrun's own store, a host that comes back after a failure can never join again.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("torch.distributed", "torch.distributed.run", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    parser = get_args_parser()
    parser.add_argument("--status-folder", "--status_folder", type=Path)
    args = parser.parse_args(words)
    _leave(args.status_folder, f"{socket.gethostname()}.started")
    if getattr(args, "shutdown_timeout", None) == parser.get_default("shutdown_timeout"):
        args.shutdown_timeout = SHUTDOWN_SECONDS
    if is_one_machine(args):
        args.local_addr = args.local_addr or "127.0.0.1"  # this host's name may have no address, and needs none
    return _leave_status(_status_of(args), args.status_folder)


def _status_of(args: Namespace) -> int:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import run

    try:
        require_network(args)
        with (
            _ending_with_ranks(args.status_folder),
            _noticing_another_program(args),
            _naming_the_killed() as ended_first,
        ):
            run(args)
    except ChildFailedError as error:
        # Once one has failed, torchrun ends the others; how those end is no cause, unless they say that it is.
        ends = [end for end in error.failures.values() if end.pid in ended_first or end.exitcode in CAUSES[:3]]
        return cause(rank_status(end.exitcode) for end in ends) or EXIT_FAILURE
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except UserError as error:
        _say(str(error))
        return error.exit_status
    except (RendezvousError, DistError, TimeoutError) as error:
        _say(why_not_met(error, args))
        return UnreachableError.exit_status
    return 0


def is_one_machine(args: Namespace) -> bool:
    """Whether torchrun's words are for this host alone."""
    return args.standalone or args.nnodes in ("1", "1:1")


def rank_status(exit_code: int) -> int:
    """A rank's status by Python's exit code: a rank that a signal ended is lost, unless it was asked to end."""
    asked = (-signal.SIGTERM, -signal.SIGINT)
    return exit_code if exit_code >= 0 else 128 - exit_code if exit_code in asked else EXIT_UNREACHABLE


def _leave_status(status: int, folder: Path | None) -> int:
    _leave(folder, socket.gethostname(), f"{status}\n")
    return status


def _leave(folder: Path | None, name: str, text: str = "") -> None:
    if folder is not None:
        with contextlib.suppress(OSError):  # whoever looks for it takes what else there is
            (folder / name).write_text(text)


@contextlib.contextmanager
def _naming_the_killed() -> Iterator[set[int]]:
    """A line for each rank that a signal ends while nobody has asked it to, at every start of the ranks.

    Yields:
        the process numbers of all ranks that have ended in error before torchrun ended the others.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    close, ended_first, closed = SubprocessContext.close, set[int](), list[Any]()

    def close_and_tell(context: Any, *args: Any, **more: Any) -> None:
        known = [] if context in closed else context._failures.values()  # closed twice: the second finds its own kills
        closed.append(context)
        for end in known:
            if end.exitcode < 0:
                _say(killed_line(context.envs[end.local_rank]["RANK"], end.pid, -end.exitcode))
            ended_first.add(end.pid)
        close(context, *args, **more)

    SubprocessContext.close = close_and_tell  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield ended_first
    finally:
        SubprocessContext.close = close


def killed_line(rank: str, pid: int, signum: int) -> str:
    """What to say of a rank that signal `signum` has ended."""
    known = signum in set(signal.Signals)
    name, usual = signal.Signals(signum).name if known else f"signal {signum}", SENDERS.get(signum, "")
    return f"rank {rank} (process {pid}) was killed by {name}" + (f", {usual}" if usual else "")


@contextlib.contextmanager
def _ending_with_ranks(status_folder: Path | None) -> Iterator[None]:
    """End this process when its ranks have, even if torchrun does not see it.

    torchrun asks the first host between two looks at its ranks. If that host is gone without a word, the answer takes
    as long as the network's own timeouts.
    """
    left = threading.Event()

    def watch() -> None:
        since = time.monotonic()
        while not left.wait(1):
            ranks = psutil.Process().children()
            if not ranks or any(rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
                since = time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                _say("all ranks here have ended, and torchrun gets no answer from the first host")
                os._exit(_leave_status(cause(_exit_status(rank.pid) for rank in ranks), status_folder))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _exit_status(pid: int) -> int:
    """The exit status of a child that has ended; the child is left for others to wait for."""
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert end is not None
    return rank_status(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status)


@contextlib.contextmanager
def _noticing_another_program(args: Namespace) -> Iterator[None]:
    """End this process, with a line, if what answers at the first host's port is not torchrun.

    torchrun would wait for its answer for as long as hosts wait for each other, and then say that they did not come.
    """
    left = threading.Event()

    def watch() -> None:
        if left.wait(TELL_AFTER_SECONDS) or answers_as_store(*head_of(args)):
            return
        if not left.is_set():
            _say(port_taken(*head_of(args)))
            os._exit(_leave_status(EXIT_UNREACHABLE, args.status_folder))

    if not is_one_machine(args):
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def answers_as_store(head: str, port: str) -> bool:
    """Whether torchrun's store answers there within some seconds, or nothing does: that is for others to tell."""
    import torch.distributed as dist

    with contextlib.suppress(OSError), socket.create_connection((head, int(port)), 3.0):
        answered = threading.Event()

        def ask() -> None:  # it has no time-out of its own
            with contextlib.suppress(RuntimeError):
                seconds = timedelta(seconds=PROBE_SECONDS)
                dist.TCPStore(head, int(port), is_master=False, timeout=seconds, wait_for_workers=False)
                answered.set()

        threading.Thread(target=ask, daemon=True).start()
        return answered.wait(PROBE_SECONDS)
    return True


def port_taken(head: str, port: str) -> str:
    """The line that another program has the port, and which one if it is on this host."""
    name = ""
    with contextlib.suppress(psutil.Error, OSError):
        listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr and c.pid)
        found = next((c.pid for c in listening if c.laddr[1:2] == (int(port),)), None)
        if found and is_this_host(head, port):
            name = f" ({psutil.Process(found).name()}, process {found})"
    return f"port {port} of {head} belongs to another program{name}; give another port, the same one on every host"


def require_network(args: Namespace) -> None:
    """Check this host's settings, and wait until the first host can be reached.

    Args:
        args: of torchrun.

    Raises:
        UserError: an interface that does not exist on this host.
        TimeoutError: the first host could not be reached within the rendezvous's join_timeout.
    """
    if is_one_machine(args):
        return
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in INTERFACE_VARIABLES:
        if problem := interface_problem(variable, os.environ.get(variable, ""), interfaces):
            raise UserError(problem)
    started, told = time.monotonic(), False
    while problem := reach_problem(*head_of(args)):
        waited = time.monotonic() - started
        if waited > join_seconds(args):
            raise TimeoutError(problem)
        if waited > TELL_AFTER_SECONDS and not told:
            told = True
            _say(f"waiting for the first host at {':'.join(head_of(args))}: {problem}", kind="note")
        time.sleep(1)


def join_seconds(args: Namespace) -> float:
    """How long hosts wait for each other: join_timeout of --rdzv-conf, else torchrun's 600 seconds."""
    settings = dict(pair.partition("=")[::2] for pair in args.rdzv_conf.split(",") if pair)
    return float(settings.get("join_timeout", "600"))


def interface_problem(variable: str, value: str, interfaces: Iterable[str]) -> str | None:
    """What is wrong with GLOO_SOCKET_IFNAME (names) or NCCL_SOCKET_IFNAME (prefixes; `=` exact, `^` all but)."""
    interfaces = list(interfaces)
    exact = variable == "GLOO_SOCKET_IFNAME" or value.startswith("=")
    names = value.removeprefix("=").split(",") if value and not value.startswith("^") else []
    for name in names:
        if not any(own == name if exact else own.startswith(name) for own in interfaces):
            known = ", ".join(interfaces)
            return f"{variable}={value}: this host has no {name}, but {known}{nearest(name, interfaces)}"
    return None


def why_not_met(error: Exception, args: Namespace) -> str:
    """Why the rendezvous failed, in one line."""
    head, port = head_of(args)
    cause = reach_problem(head, port)
    if cause:
        return (
            f"cannot reach the first host at {head}:{port}: {cause}; is its part running, is this its address in "
            "your network, and is the port open?"
        )
    text = f"{type(error).__name__} {error}".lower()
    if "timeout" in text or "timed out" in text:
        return (
            f"not all of {args.nnodes} hosts came to {head}:{port} within {join_seconds(args):g} s; each needs the "
            "same command, with the same --nnodes and --rdzv-id"
        )
    return f"the hosts could not meet at {head}:{port}: {type(error).__name__} {' '.join(str(error).split())}"


def reach_problem(head: str, port: str, timeout_seconds: float = 3.0) -> str | None:
    """Why the first host cannot be reached, in the operating system's words; None if it can, or is this host."""
    try:
        if is_this_host(head, port):
            return None
        socket.create_connection((head, port), timeout_seconds).close()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def is_this_host(head: str, port: str) -> bool:
    """Whether the name is an address of this host.

    Raises:
        OSError: it has no address.
    """
    address = socket.getaddrinfo(head, port, type=socket.SOCK_STREAM)[0]
    with contextlib.suppress(OSError), socket.socket(address[0], address[1]) as own:
        own.bind((address[4][0], 0))
        return True
    return False


def head_of(args: Namespace) -> tuple[str, str]:
    """Name and port of the host where all meet, as torchrun reads them from its words.

    Raises:
        UserError: the port is no number, or the name no name.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        head, port = parse_rendezvous_endpoint(args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}", 29400)
    except ValueError as error:
        raise UserError(str(error)) from error
    return head, str(port)  # 29400: torchrun's default of c10d


def _say(text: str, kind: str = "error") -> None:
    with contextlib.suppress(OSError):  # a full disk under the output ends no host
        print(f"[host {socket.gethostname()}] {kind}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
