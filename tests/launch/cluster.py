"""A Slurm cluster on machines of this machine: the real slurmctld, slurmd and munged of Debian's slurm-wlm."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.launch.machines import Machines, machines
from tests.launch.machines import why_not as no_machines

NODES = ["node1", "node2", "node3"]
CONF = """\
ClusterName=moco
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=30
MinJobAge=600
JobRequeue=1
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,requeue_setup_env_fail
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=2-00:00:00 State=UP
"""


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    if reason := no_machines():
        return reason
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)" if missing else None


@dataclass(frozen=True)
class Cluster:
    """A host `head` and nodes with 8 CPUs and 8 things called GPUs each."""

    machines: Machines
    environment: dict[str, str]

    def run(self, words: list[str], cwd: Path | None = None, **more) -> subprocess.CompletedProcess:
        """Run on the head host."""
        return self.machines.run("head", words, cwd, env=self.environment, **more)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, key by key."""
        done = self.run(["scontrol", "--oneliner", "show", "job", number])
        return dict(pair.partition("=")[::2] for pair in done.stdout.split())

    def wait(self, number: str, condition, seconds: float = 120, tell=str) -> dict[str, str]:
        """Until `condition(job)`; returns the job."""
        deadline = time.monotonic() + seconds
        while not condition(job := self.job(number)):
            assert time.monotonic() < deadline, f"{job}\n{tell()}"
            time.sleep(0.3)
        return job


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start it, wait until all nodes are idle, and remove it with everything that runs on it."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(machines(["head", *NODES], folder))
        nodes = [
            f"NodeName={name} NodeAddr={made.address(name)} CPUs=8 RealMemory=1000 Gres=gpu:8 State=UNKNOWN"
            for name in NODES
        ]
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(folder=folder, head=made.address("head"), nodes="\n".join(nodes)))
        (folder / "gres.conf").write_text("NodeName=node[1-3] Name=gpu File=/dev/tty[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        environment = {**os.environ, "SLURM_CONF": str(conf)}
        munged = subprocess.Popen(
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
             f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(munged.wait)
        stack.callback(munged.terminate)
        made.start("head", ["slurmctld", "-D", "-i"], folder / "slurmctld.out", env=environment)
        for name in NODES:
            made.start(name, ["slurmd", "-D", "-N", name], folder / f"{name}.out", env=environment)
        ready = Cluster(made, environment)
        deadline = time.monotonic() + 60
        while (states := ready.run(["sinfo", "-hN", "-o", "%t"]).stdout.split()) != ["idle"] * len(NODES):
            logs = "".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"{states}\n{logs}"
            time.sleep(0.2)
        yield ready
