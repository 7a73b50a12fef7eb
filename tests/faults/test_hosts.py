"""Hosts as network namespaces: one loses its power, its link or its rank; the other says who, and training goes on."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.hosts import hosts, why_not
from tests.faults.processes import TINY, command, losses, steps_logged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(280),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]
RENDEZVOUS = "join_timeout=120,last_call_timeout=2,close_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
STOP = 400


class Cluster:
    """Two hosts, a rank on each, under torchrun with --nnodes 1:2. The first is that of the rendezvous."""

    def __init__(self, network, data, run_dir, torchrun="torch.distributed.run"):
        self.network, self.run_dir, self.agents = network, run_dir, []
        self._outputs = [run_dir.with_name(f"host{host}.txt") for host in range(network.count)]
        for host in range(network.count):
            words = [
                "env", "OMP_NUM_THREADS=1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "GLOO_SOCKET_IFNAME=eth0",
                sys.executable, "-m", torchrun, "--nnodes", "1:2", "--nproc-per-node", "1",
                "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "faults",
                "--rdzv-endpoint", f"{network.address(0)}:29517", "--rdzv-conf", f"{RENDEZVOUS},is_host={host == 0}",
                "--local-addr", network.address(host), "--shutdown-timeout", "3",
                "-m", "moco_dist", "pretrain", "--data.root", str(data), "--run.dir", str(run_dir), *TINY,
                "--checkpoint.every-steps", "4", "--run.stop-at-step", str(STOP),
            ]  # fmt: skip
            with self._outputs[host].open("w") as output:
                self.agents.append(
                    subprocess.Popen(network.command(host, words), stdout=output, stderr=subprocess.STDOUT)
                )

    def output(self, host):
        return self._outputs[host].read_text(errors="replace")

    def wait_for(self, condition, what):
        while not condition():
            assert self.agents[0].poll() is None, f"{what}:\n{self.output(0)}"
            time.sleep(0.1)

    def wait_until_it_goes_on(self):
        before = steps_logged(self.run_dir)
        self.wait_for(lambda: "goes on at step" in self.output(0) + self.output(1), "training again")
        self.wait_for(lambda: steps_logged(self.run_dir) > before, "further than before")

    def pids(self, host):
        name = f"{self.network.prefix}-{host}"
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in found.split()]

    def cut_link(self, host):
        switch = f"{self.network.prefix}-switch"
        subprocess.run(["ip", "-n", switch, "link", "set", f"p{host}", "down"], check=True)

    def power_cut(self, host):
        """No connection is closed: the link goes first."""
        self.cut_link(host)
        for pid in self.pids(host):
            os.kill(pid, signal.SIGKILL)

    def kill_rank(self, host):
        """Its torchrun lives."""
        for process in map(psutil.Process, self.pids(host)):
            if "moco_dist" in process.cmdline() and "--nnodes" not in process.cmdline():
                process.kill()

    def stop(self):
        for host in range(self.network.count):
            for pid in self.pids(host):
                os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait()


@pytest.mark.parametrize("fault", ["power_cut", "cut_link"])
def test_the_other_host_names_it_and_goes_on(tiny_data, tmp_path, fault):
    run_dir = tmp_path / "run"
    with hosts(2) as network:
        cluster = Cluster(network, tiny_data, run_dir)
        try:
            cluster.wait_for(lambda: steps_logged(run_dir) >= 12, "two hosts train")
            both = re.search(r"on 2 rank\(s\)", cluster.output(0) + cluster.output(1))
            assert both
            # The host of rank 0 and of the rendezvous stays; the fault is the other's, whichever ranks torchrun chose.
            getattr(cluster, fault)(1)
            cluster.wait_until_it_goes_on()
            seen = cluster.output(0)
        finally:
            cluster.stop()
    assert re.search(r"rank \d on host \S+ has not been heard of for 4 s", seen), seen
    assert "on 1 rank(s)" in seen
    start = int(re.search(r"goes on at step (\d+)", seen)[1])
    assert start % 4 == 0
    assert start >= 8  # at most one interval is lost
    assert list(losses(run_dir)) == sorted(losses(run_dir))


def test_a_killed_rank_is_started_again_and_both_hosts_go_on(tiny_data, tmp_path):
    """Its torchrun counts a restart and the other's none: ranks that told starts apart by it would never meet."""
    run_dir = tmp_path / "run"
    with hosts(2) as network:
        cluster = Cluster(network, tiny_data, run_dir)
        try:
            cluster.wait_for(lambda: steps_logged(run_dir) >= 12, "two hosts train")
            cluster.kill_rank(1)
            cluster.wait_until_it_goes_on()
            seen = cluster.output(0) + cluster.output(1)
        finally:
            cluster.stop()
    assert seen.count("on 2 rank(s)") == 2
    assert int(re.search(r"goes on at step (\d+)", seen)[1]) in (8, 12)
    assert list(losses(run_dir)) == sorted(losses(run_dir))


def test_without_the_host_of_the_rendezvous_the_rest_ends_and_can_be_started_again(tiny_data, tmp_path):
    """By moco_dist.launchers.torchrun; torch's own gets no answer and waits on."""
    run_dir = tmp_path / "run"
    with hosts(2) as network:
        cluster = Cluster(network, tiny_data, run_dir, torchrun="moco_dist.launchers.torchrun")
        try:
            cluster.wait_for(lambda: steps_logged(run_dir) >= 12, "two hosts train")
            cluster.power_cut(0)
            assert cluster.agents[1].wait(120) == 69, cluster.output(1)
        finally:
            cluster.stop()
        step = steps_logged(run_dir)
        words = command(tiny_data, run_dir, "--run.stop-at-step", str(step + 2), ranks=1)
        again = subprocess.run(network.command(1, words), capture_output=True, text=True, check=False)
    silence = r"rank \d on host \S+ has not been heard of|holds the rendezvous store, has not answered"
    assert re.search(rf"({silence}) for 4 s", cluster.output(1))
    assert again.returncode == 0, again.stderr
    assert re.search(r"goes on at step \d+", again.stdout)


@pytest.mark.parametrize("which", ["run", "run/checkpoints"])
def test_a_run_folder_on_each_hosts_own_disk_is_refused(tiny_data, tmp_path, which):
    """Or every checkpoint would have one of two parts, and look complete."""
    (tmp_path / which).mkdir(parents=True)
    run_dir = tmp_path / "run"
    own_disk = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(tmp_path / which)]
    with hosts(2) as network:
        ranks = []
        for host in range(2):
            where = ["env", f"RANK={host}", "WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", "OMP_NUM_THREADS=1",
                     f"MASTER_ADDR={network.address(0)}", "MASTER_PORT=29518", "GLOO_SOCKET_IFNAME=eth0"]  # fmt: skip
            words = [*(own_disk if host else []), *where, *command(tiny_data, run_dir, ranks=1)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            ranks.append(subprocess.Popen(network.command(host, words), **pipes))
        outputs = [rank.communicate()[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 2, output
        assert f"run.dir {run_dir} is not one folder for all ranks: rank 1 on host" in output
    assert not list(run_dir.glob("checkpoints/*"))
