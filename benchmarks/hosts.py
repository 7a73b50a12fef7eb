"""Hosts on one machine: network namespaces on a bridge, each with its own address and a link of a chosen rate.

Needs root and iproute2 (`apt-get install iproute2`).
"""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BURST = "256kb"  # of the rate limit; below 64 kB it does not reach its rate
CLONE_NEWNET = 0x40000000  # of sched.h
INTERFACE = "eth0"
PREFIX = "mocobench"  # of the namespaces' names; this process's id follows


def why_not() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "ip and tc are not installed (Debian: iproute2)"
    return None


@dataclass(frozen=True)
class Hosts:
    """`count` hosts named 0 to count - 1.

    Attributes:
        prefix: of the namespaces' names.
        count: how many.
        subnet: first three numbers of their addresses.
    """

    prefix: str
    count: int
    subnet: str = "10.77.0"

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"{self.subnet}.{10 + host}"

    def command(self, host: int, words: list[str]) -> list[str]:
        """`words` as a command that runs on a host."""
        return ["ip", "netns", "exec", f"{self.prefix}-{host}", *words]

    def shape(self, gigabit_per_second: float | None) -> None:
        """Limit every host's link in both directions, or take the limit away."""
        for host in range(self.count):
            for namespace, device in ((f"{self.prefix}-{host}", "eth0"), (f"{self.prefix}-switch", f"p{host}")):
                in_namespace = ["ip", "netns", "exec", namespace, "tc", "qdisc"]
                subprocess.run([*in_namespace, "del", "dev", device, "root"], capture_output=True, check=False)
                if gigabit_per_second is not None:
                    rate = f"{round(gigabit_per_second * 1000)}mbit"
                    _run([*in_namespace, "add", "dev", device, "root", "tbf", "rate", rate, "burst", BURST,
                          "latency", "50ms"])  # fmt: skip

    def enter(self, host: int) -> None:
        """Put this process on a host. It must have no other thread and no connection yet."""
        with open(f"/run/netns/{self.prefix}-{host}") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {namespace.name}")


def received_bytes() -> int:
    """Bytes that the interface of this process's host has received, headers included; 0 where it has none."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            return int(numbers.split()[0])
    return 0


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Make the hosts, and remove them with everything that still runs on them, after SIGTERM too.

    Names and links are this process's own, so that two users of one machine do not meet. What a process that was
    killed left behind is removed by the next.
    """
    _remove_orphans()
    made = Hosts(f"{PREFIX}{os.getpid()}", count)
    switch = f"{made.prefix}-switch"
    on_term = signal.signal(signal.SIGTERM, lambda *_: exit(128 + signal.SIGTERM))
    try:
        _run(["ip", "netns", "add", switch])
        _run(["ip", "-n", switch, "link", "add", "br0", "type", "bridge"])
        _run(["ip", "-n", switch, "link", "set", "br0", "up"])
        for host in range(count):
            name = f"{made.prefix}-{host}"
            _run(["ip", "netns", "add", name])
            _run(["ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"p{host}",
                  "netns", switch])  # fmt: skip
            _run(["ip", "-n", switch, "link", "set", f"p{host}", "master", "br0", "up"])
            _run(["ip", "-n", name, "link", "set", "lo", "up"])
            _run(["ip", "-n", name, "addr", "add", f"{made.address(host)}/24", "dev", "eth0"])
            _run(["ip", "-n", name, "link", "set", "eth0", "up"])
        yield made
    finally:
        for name in [*(f"{made.prefix}-{host}" for host in range(count)), switch]:
            _remove(name)
        signal.signal(signal.SIGTERM, on_term)


def _remove(namespace: str) -> None:
    pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False).stdout
    for pid in pids.split():
        subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _remove_orphans() -> None:
    """Remove namespaces whose maker is gone."""
    for line in _run(["ip", "netns", "list"]).splitlines():
        name = line.split()[0]
        maker = name.removeprefix(PREFIX).split("-")[0]
        if name.startswith(PREFIX) and maker.isdecimal() and not os.path.exists(f"/proc/{maker}"):
            _remove(name)


def _run(words: list[str]) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
