"""Machines on one machine: each has its own network, host name, processes, /dev/shm and /etc/hosts.

Needs root, iproute2 and util-linux. They are joined by a bridge in a namespace of its own, so nothing is added to this
machine's network.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SUBNET = "10.79.0"
# Its first process: reaps what is left over, until it is killed, and everything on the machine with it.
INIT = """hostname "$1"; mount --bind "$2" /etc/hosts; mount -t tmpfs tmpfs /dev/shm
while :; do sleep 1000 & wait $!; done"""


def why_not() -> str | None:
    """Why machines cannot be made here, or None."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2, util-linux)"
    done = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False)
    return None if done.returncode == 0 else f"namespaces are not allowed here: {done.stderr.decode().strip()}"


@dataclass
class Machines:
    """The machines by name.

    Attributes:
        prefix: of their network namespaces' names.
        names: in the order of their addresses.
        hosts_file: what they all see as /etc/hosts.
        aliases: more names of a machine.
    """

    prefix: str
    names: list[str]
    hosts_file: Path
    aliases: dict[str, list[str]] = field(default_factory=dict)
    _init: dict[str, tuple[subprocess.Popen, int]] = field(default_factory=dict)
    _started: list[subprocess.Popen] = field(default_factory=list)

    def address(self, name: str) -> str:
        """IPv4 address of a machine."""
        return f"{SUBNET}.{10 + self.names.index(name)}"

    def command(self, name: str, words: list[str], cwd: Path | None = None) -> list[str]:
        """`words` as a command that runs on a machine."""
        pid = str(self._init[name][1])
        return ["nsenter", "-t", pid, "-n", "-u", "-i", "-p", "-m", f"--wd={cwd or Path.cwd()}", "--", *words]

    def run(self, name: str, words: list[str], cwd: Path | None = None, **more) -> subprocess.CompletedProcess:
        """Run to the end on a machine, output captured as text."""
        more = {"capture_output": True, "text": True, "check": False, "timeout": 120, **more}
        return subprocess.run(self.command(name, words, cwd), **more)

    def start(self, name: str, words: list[str], log: Path, cwd: Path | None = None, **more) -> subprocess.Popen:
        """Start on a machine, output to a file."""
        with log.open("a") as file:
            words = self.command(name, words, cwd)
            self._started.append(subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, **more))
        return self._started[-1]

    def pull_cable(self, name: str) -> None:
        """Nothing reaches the machine any more, and nobody is told."""
        _ip("-n", f"{self.prefix}-switch", "link", "set", f"p{self.names.index(name)}", "down")

    def cut_power(self, name: str) -> None:
        """The machine stops at once; its peers get no word of it."""
        self.pull_cable(name)
        os.kill(self._init[name][1], 9)
        self._init[name][0].wait()

    def _make(self, name: str) -> None:
        number, space, switch = self.names.index(name), f"{self.prefix}-{name}", f"{self.prefix}-switch"
        _ip("netns", "add", space)
        _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", f"p{number}", "netns", switch)
        _ip("-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        process = subprocess.Popen(
            ["ip", "netns", "exec", space, "unshare", "--uts", "--ipc", "--mount", "--pid", "--fork",
             "--kill-child=KILL", "--mount-proc", "bash", "-c", INIT, "init", name, str(self.hosts_file)],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children and _host_name(children[0]) == name:
                self._init[name] = (process, int(children[0]))
                return
            time.sleep(0.02)
        process.kill()
        raise RuntimeError(f"machine {name} did not start")

    def _remove(self) -> None:
        for process, pid in self._init.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
            process.wait()
        for process in self._started:
            process.wait()
        for name in [*self.names, "switch"]:
            subprocess.run(["ip", "netns", "del", f"{self.prefix}-{name}"], capture_output=True, check=False)


@contextlib.contextmanager
def machines(names: list[str], folder: Path, aliases: dict[str, list[str]] | None = None) -> Iterator[Machines]:
    """Make machines, and remove them with everything that still runs on them.

    Args:
        names: of the machines.
        folder: for their /etc/hosts.
        aliases: more names of some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = Machines(f"ml{os.getpid()}", names, folder / "hosts", aliases or {})
    lines = [f"{made.address(name)} {' '.join([name, *made.aliases.get(name, [])])}" for name in names]
    made.hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    try:
        _ip("netns", "add", f"{made.prefix}-switch")
        _ip("-n", f"{made.prefix}-switch", "link", "add", "br0", "type", "bridge")
        _ip("-n", f"{made.prefix}-switch", "link", "set", "br0", "up")
        for name in names:
            made._make(name)
        yield made
    finally:
        made._remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _host_name(pid: str) -> str:
    done = subprocess.run(["nsenter", "-t", pid, "-u", "hostname"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
