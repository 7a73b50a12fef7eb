"""torchrun that speaks to people and to schedulers: `python -m launchers.torchrun` takes torchrun's own words.

Two things differ. It exits with its ranks' exit status (75: saved and preempted; 69: another host is lost; 2: a
mistake), where torchrun exits with 1 whatever happened, so that a Slurm script or a Kubernetes policy can tell a run
that should be started again from one that would fail again. And what keeps hosts from meeting is one line on the host
where it is, in place of a traceback.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator

import psutil

from moco_dist.errors import UnreachableError, UserError, nearest

EXIT_INTERRUPTED = 130
SHUTDOWN_SECONDS = 90  # what ranks have to save in after a SIGTERM, of the 120 that schedulers give
TELL_AFTER_SECONDS = 10
STUCK_SECONDS = 10  # torchrun looks at its ranks ten times a second
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def torchrun(words: list[str]) -> int:
    """Run torchrun with `words` in this process; returns the exit status. The ranks speak for themselves."""
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read when torch is loaded: no warning for every retry
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import get_args_parser, run

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the ranks' warnings are worth reading
    # Where a worker shares torchrun's own store, a host that comes back after a failure can never join again.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("torch.distributed", "torch.distributed.run", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    args = get_args_parser().parse_args(words)
    if getattr(args, "shutdown_timeout", None) == get_args_parser().get_default("shutdown_timeout"):
        args.shutdown_timeout = SHUTDOWN_SECONDS
    try:
        require_network(args)
        with _ending_with_ranks():
            run(args)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status  # killed by a signal
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


@contextlib.contextmanager
def _ending_with_ranks() -> Iterator[None]:
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
                os._exit(max(_exit_status(rank.pid) for rank in ranks))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _exit_status(pid: int) -> int:
    """Of a child that has ended, as a shell would say it; the child is left for others to wait for."""
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert end is not None
    return end.si_status if end.si_code == os.CLD_EXITED else 128 + end.si_status


def require_network(args: Namespace) -> None:
    """Check this host's settings, and wait until the first host can be reached.

    Args:
        args: of torchrun.

    Raises:
        UserError: an interface that does not exist on this host.
        TimeoutError: the first host could not be reached within the rendezvous's join_timeout.
    """
    if args.standalone or args.nnodes in ("1", "1:1"):
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
        address = socket.getaddrinfo(head, port, type=socket.SOCK_STREAM)[0]
        with contextlib.suppress(OSError), socket.socket(address[0], address[1]) as own:
            own.bind((address[4][0], 0))
            return None
        socket.create_connection((head, port), timeout_seconds).close()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


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
