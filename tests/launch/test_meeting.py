"""Hosts that do not meet: one line each, where a person looks; and hosts that do, as docs/launch.md says."""

import re
import sys
import time
from argparse import Namespace

import pytest

from moco_dist.errors import UserError
from moco_dist.launchers.hosts import endpoint
from moco_dist.launchers.torchrun import head_of, interface_problem, rank_status, reach_problem
from tests.launch.machines import machines, why_not
from tests.launch.small import last_step, wait_for_step, write_configs

hosts_only = [pytest.mark.slow, pytest.mark.timeout(200)]
if reason := why_not():
    hosts_only.append(pytest.mark.skip(reason=f"no machines: {reason}"))
TORCHRUN = [sys.executable, "-m", "moco_dist.launchers.torchrun", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
LAUNCH = [sys.executable, "-m", "moco_dist", "launch", "torchrun"]


@pytest.fixture
def two(tmp_path):
    with machines(["node1", "node2"], tmp_path / "machines") as made:
        yield made


def on_hosts(function):
    for mark in hosts_only:
        function = mark(function)
    return function


def meet(two, host, *words, head="node1:29500", seconds=5, **environment):
    """Run torchrun on a host; it waits only a few seconds for the other."""
    patience = ["--nnodes", "2", "--rdzv-endpoint", head, "--rdzv-id", "x", f"--rdzv-conf=join_timeout={seconds}"]
    variables = [f"{name}={value}" for name, value in environment.items()]
    command = ["env", *variables, *TORCHRUN, *patience, *words, "-m", "moco_dist", "--version"]
    done = two.run(host, command)
    return done.returncode, [line for line in done.stderr.splitlines() if line]


@on_hosts
def test_a_head_that_was_not_started(two):
    status, lines = meet(two, "node2")
    assert status == 69
    assert lines == [
        "[host node2] error: cannot reach the first host at node1:29500: connection refused; is its part running, is "
        "this its address in your network, and is the port open?"
    ]


@on_hosts
def test_a_head_without_a_network(two):
    two.pull_cable("node1")
    status, lines = meet(two, "node2")
    assert status == 69
    assert len(lines) == 1
    assert re.search(r"host node2\] error: cannot reach .* node1:29500: (no answer|no route to host)", lines[0])


@on_hosts
def test_a_head_that_nobody_knows(two):
    status, lines = meet(two, "node2", head="nod1:29500")
    assert status == 69
    assert len(lines) == 1
    assert re.search(r"cannot reach the first host at nod1:29500: .*(not known|failure in name)", lines[0])


@on_hosts
def test_a_host_that_never_comes(two):
    status, lines = meet(two, "node1")
    assert status == 69
    assert lines == [
        "[host node1] error: not all of 2 hosts came to node1:29500 within 5 s; each needs the same command, with the "
        "same --nnodes and --rdzv-id"
    ]


@on_hosts
def test_an_interface_that_is_not_there(two):
    status, lines = meet(two, "node2", GLOO_SOCKET_IFNAME="eth1")
    assert status == 2
    assert lines == [
        "[host node2] error: GLOO_SOCKET_IFNAME=eth1: this host has no eth1, but lo, eth0; did you mean eth0?"
    ]


@on_hosts
@pytest.mark.parametrize("host", ["node1", "node2"])
def test_a_port_that_belongs_to_another_program(two, host, tmp_path):
    """It takes connections, and never answers."""
    program = "import socket, time; s = socket.create_server(('', 29500)); print(flush=True); time.sleep(600)"
    two.start("node1", [sys.executable, "-c", program], tmp_path / "program.log")
    deadline = time.monotonic() + 60
    while not (tmp_path / "program.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    status, lines = meet(two, host, seconds=600)
    assert status == 69
    assert len(lines) == 1, lines
    which = r" \(python.*, process \d+\)" if host == "node1" else ""
    assert re.search(rf"host {host}\] error: port 29500 of node1 belongs to another program{which}; give another port",
                     lines[0])  # fmt: skip


@on_hosts
def test_one_machine_needs_no_address_of_its_name(two, tmp_path):
    config = write_configs(tmp_path)
    two.run("node1", ["hostname", "no-such-host"])
    words = [sys.executable, "-m", "moco_dist", "launch", "local", str(config), "--gpus-per-node", "2",
             "--run.device", "cpu", "--run.stop-at-step", "2"]  # fmt: skip
    done = two.run("node1", words)
    assert done.returncode == 0, done.stderr
    assert last_step(tmp_path / "runs" / "small") == 2


@on_hosts
def test_a_rank_that_is_killed_is_named_with_what_usually_kills_it(two, tmp_path):
    program = "import os, time; (time.sleep(100) if os.environ['RANK'] == '0' else os.kill(os.getpid(), 9))"
    words = [*TORCHRUN[:3], "--nproc-per-node", "2", "--standalone", "--no-python", sys.executable, "-c", program]
    done = two.run("node1", [*words[:3], "--status-folder", str(tmp_path), *words[3:]])
    assert done.returncode == 69
    (line,) = done.stderr.splitlines()
    assert re.search(r"host node1\] error: rank 1 \(process \d+\) was killed by SIGKILL, usually by the", line)
    assert (tmp_path / "node1").read_text() == "69\n"


@on_hosts
def test_two_hosts_by_the_docs(two, tmp_path):
    """Started ten seconds apart, the second first; a host that loses its network is named, and they go on together."""
    config, run_dir = write_configs(tmp_path), tmp_path / "runs" / "small"
    words = [*LAUNCH, str(config), "--nodes", "2", "--gpus-per-node", "0", "--head", "node1"]
    logs = {name: tmp_path / f"{name}.log" for name in ("node1", "node2")}
    second = two.start("node2", words, logs["node2"])
    deadline = time.monotonic() + 60
    while "note: waiting for the first host at node1:29500" not in logs["node2"].read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first = two.start("node1", words, logs["node1"])
    wait_for_step(run_dir, 12, tell=lambda: "".join(log.read_text() for log in logs.values()))
    two.pull_cable("node2")
    assert first.wait(60) == 69
    assert re.search(r"rank 1 on host node2 has not been heard of for 5 s", logs["node1"].read_text())
    assert second.wait(60) == 69
    assert last_step(run_dir) >= 12
    alone = [*LAUNCH, str(config), "--gpus-per-node", "0", "--run.stop-at-step", str(last_step(run_dir) + 4)]
    done = two.run("node1", alone)
    assert done.returncode == 0, done.stderr
    assert re.search(r"goes on at step \d+", done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("exit_code", "status"), [(2, 2), (75, 75), (-9, 69), (-6, 69), (-11, 69), (-15, 143), (-2, 130)]
)
def test_a_rank_that_a_signal_ended_is_a_lost_one(exit_code, status):
    assert rank_status(exit_code) == status


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "", True),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "ib,eth", False),
    ],
)
def test_interface_names_are_read_as_gloo_and_nccl_read_them(variable, value, fits):
    assert (interface_problem(variable, value, ["lo", "eth0"]) is None) == fits


@pytest.mark.parametrize(
    ("head", "name", "port"),
    [
        ("node1", "node1", "29500"),
        ("node1:29400", "node1", "29400"),
        ("10.0.0.1", "10.0.0.1", "29500"),
        ("::1", "::1", "29500"),
        ("[::1]", "::1", "29500"),
        ("[::1]:29400", "::1", "29400"),
    ],
)
def test_heads_by_name_and_by_address(head, name, port):
    found = head_of(Namespace(rdzv_endpoint=endpoint(head)))
    assert found == (name, port)
    if name == "::1":
        assert reach_problem(*found) is None  # this host


def test_the_head_that_a_scheduler_sets():
    assert head_of(Namespace(rdzv_endpoint="", master_addr="job-0.job", master_port=29400)) == ("job-0.job", "29400")


def test_a_port_that_is_none():
    with pytest.raises(UserError, match="port number of the rendezvous endpoint 'node1:http' must be an integer"):
        head_of(Namespace(rdzv_endpoint="node1:http"))
