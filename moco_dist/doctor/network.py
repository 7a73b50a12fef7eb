"""What a run needs of others: the tracking server, an interface to the other hosts, clocks that agree."""

import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from moco_dist.config.credentials import without_credentials
from moco_dist.config.run import TrackingConfig
from moco_dist.doctor.finding import Finding, fine, problem, warning
from moco_dist.errors import UserError
from moco_dist.launchers.torchrun import INTERFACE_VARIABLES, interface_problem
from moco_dist.tracking.failure import proxy_of
from moco_dist.tracking.server import absolute, default_uri, require_usable

INTERFACES = Path("/sys/class/net")
VIRTUAL = ("docker", "veth", "virbr", "br-", "cni", "flannel", "cali", "tun", "tap")
ANSWER_SECONDS = 5
CLOCK_SECONDS = 1.0


def mlflow_server(config: TrackingConfig) -> Finding:
    """Whether the tracking server answers."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    shown = without_credentials(uri)
    if config.backend == "none":
        return fine("MLflow", "off (tracking.backend none)")
    if not uri.startswith("http"):
        given_by = "tracking.uri" if config.uri else "MLFLOW_TRACKING_URI"
        try:
            require_usable(absolute(uri or default_uri(Path())), given_by)
        except UserError as error:
            return problem("MLflow", str(error))
        return fine("MLflow", f"a database, not a server: {shown or 'sqlite beside the run'}")
    try:
        with urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=ANSWER_SECONDS):
            return fine("MLflow", f"{shown} answers")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return fine("MLflow", f"{shown} answers, and asks who you are")
        proxy = proxy_of(uri)
        asked = f", asked through the proxy {proxy}" if proxy else ""
        return problem("MLflow", f"{shown} answers {error.code} {error.reason}{asked}: is it an MLflow server?")
    except (OSError, ValueError) as error:
        reason, proxy = getattr(error, "reason", error), proxy_of(uri)
        reason = f"{reason}; asked through the proxy {proxy}" if proxy else reason
        return problem("MLflow", f"{shown} does not answer ({reason}): check --tracking.uri and "
                       "MLFLOW_TRACKING_URI, or --tracking.backend none")  # fmt: skip


def interfaces(env: Mapping[str, str] = os.environ, folder: Path = INTERFACES) -> list[Finding]:
    """Which interface NCCL (on GPUs) and gloo (on CPUs) will take, for runs on several hosts."""
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    up = [name for name in present if name != "lo" and _is_up(folder / name)]
    real = [name for name in up if not name.startswith(VIRTUAL)]
    found = []
    for variable in INTERFACE_VARIABLES:
        if wrong := interface_problem(variable, env.get(variable, ""), present):
            found.append(problem("interface", wrong))
    if len(real) != len(up) and not env.get("NCCL_SOCKET_IFNAME"):
        virtual = ", ".join(name for name in up if name not in real)
        found.append(warning("interface", f"NCCL may take {virtual}, which leads to no other host: export "
                             f"NCCL_SOCKET_IFNAME={(real or ['NAME'])[0]}"))  # fmt: skip
    elif len(real) > 1 and not env.get("NCCL_SOCKET_IFNAME"):
        found.append(warning("interface", f"several ({', '.join(real)}): say which one leads to the other hosts, "
                             f"export NCCL_SOCKET_IFNAME={real[0]}"))  # fmt: skip
    return found or [fine("interface", ", ".join(real) or "only loopback: one host")]


def host_name() -> Finding:
    """Gloo binds to the address of the host's name: 127.0.1.1 in Debian's /etc/hosts is no address for others."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return warning("host name", f"{name} has no address: a line in /etc/hosts, or GLOO_SOCKET_IFNAME")
    if ipaddress.ip_address(address).is_loopback and not os.environ.get("GLOO_SOCKET_IFNAME"):
        return warning("host name", f"{name} is {address}, which no other host can reach: for several hosts "
                       "export GLOO_SOCKET_IFNAME, or correct /etc/hosts")  # fmt: skip
    return fine("host name", f"{name} is {address}")


def clocks(seconds_by_host: Mapping[str, float]) -> Finding:
    """Whether hosts agree on the time, which was read on all of them at once; logs and tracking have it."""
    late, early = min(seconds_by_host.values()), max(seconds_by_host.values())
    if early - late > CLOCK_SECONDS:
        names = {seconds: host for host, seconds in seconds_by_host.items()}
        return warning("clocks", f"{names[late]} is {early - late:.1f} s behind {names[early]}: start chrony or "
                       "systemd-timesyncd on both")  # fmt: skip
    return fine("clocks", f"{len(seconds_by_host)} host(s) agree within {CLOCK_SECONDS:g} s")


def _is_up(interface: Path) -> bool:
    try:
        return (interface / "operstate").read_text().strip() in ("up", "unknown")
    except OSError:
        return False
