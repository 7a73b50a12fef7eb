"""`moco-dist doctor` in situations that are really broken: little memory, few files, a dead server."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.run import TrackingConfig
from moco_dist.config.source import read_config
from moco_dist.doctor import machine, network
from moco_dist.errors import EXIT_MISTAKE

NEEDED = ["--run.dir", "r", "--data.root", "d"]


def config_of(*flags):
    return read_config(PretrainConfig, None, [*NEEDED, *flags])


def doctor(tmp_path, *flags, before=()):
    words = [*before, sys.executable, "-m", "moco_dist", "doctor", "--run.dir", str(tmp_path / "r"), *flags]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
def test_few_files(tmp_path):
    flags = ["--data.root", str(tmp_path), "--data.num-workers", "32"]
    done = doctor(tmp_path, *flags, before=["bash", "-c", 'ulimit -n 300 && exec "$@"', "-"])
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "a process may open 300" in errors[0]
    assert "a hard limit (ulimit -Hn) of 4096" in errors[0]


def test_the_hard_limit_on_files_has_to_do_for_rank_0_of_many(monkeypatch):
    """The soft one is raised to it. Rank 0 was found to hold 4 W + 17 connections."""
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    config = config_of("--data.num-workers", "8")
    assert machine.open_files(config, 8, 512).level == "ok"
    found = machine.open_files(config, 8, 1024)
    assert found.level == "error"
    assert "a process may open 4096, and about 4400 are needed" in found.text
    assert machine.open_files(config, 8, 1).text == "a process may open 4096, about 304 are needed"


def test_little_memory(tmp_path, monkeypatch):
    """Of the host, or by the limit of a container."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 2000000 kB\n")
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "MEMORY_LIMITS", (tmp_path / "max",))
    config = config_of("--data.num-workers", "8", "--data.prefetch-batches", "2")
    assert machine.memory(config, 1, 256).level == "ok"
    (tmp_path / "max").write_text("max\n")
    assert machine.memory(config, 1, 256).level == "ok"
    (tmp_path / "max").write_text(str(500 * 2**20))
    found = machine.memory(config, 1, 256)
    assert found.level == "error"
    assert "500 MiB free, loaders may fill 1,838 MiB: fewer data.num_workers" in found.text


def test_weights_that_a_run_would_begin_with_are_there(tmp_path):
    """A run that has a checkpoint goes on from that."""
    flags = ["--run.dir", str(tmp_path / "r"), "--model.init"]
    (found,) = machine.start(config_of(*flags, str(tmp_path / "w.pth")))
    assert (found.level, found.about) == ("error", "model.init")
    assert found.text.startswith(
        f"{tmp_path}/w.pth does not exist; a file of weights, the folder of a run and timm:NAME"
    )
    (tmp_path / "w.pth").touch()
    assert machine.start(config_of(*flags, str(tmp_path / "w.pth"))) == []
    assert machine.start(config_of(*flags, "timm:resnet18")) == machine.start(config_of()) == []
    (tmp_path / "r" / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert machine.start(config_of(*flags, str(tmp_path / "gone.pth"))) == []


def test_a_network_that_is_much_work_for_a_cpu_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(machine, "num_gpus", lambda: 0)
    monkeypatch.setattr(machine, "_has_nvidia_driver", lambda: False)
    found = machine.gpus(config_of("--model.arch", "resnet18"), 1)
    assert (found.level, found.text.partition(";")[0]) == (
        "warning",
        "none, and resnet18 at 224 px is much work for a CPU",
    )


@pytest.mark.slow
def test_only_errors_make_the_exit_status(tmp_path):
    done = doctor(tmp_path, "--data.num-workers", "0")
    assert done.returncode == 0, done.stdout
    assert "warning" in done.stdout
    done = doctor(tmp_path, "--optim.global-batch-size", "100")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("error    config: optim.global_batch_size 100")


@pytest.mark.slow
def test_two_ranks_of_torchrun_say_everything_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "moco_dist", "doctor", *NEEDED, "--data.num-workers", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) == len({line.split(":")[0] for line in lines})
    assert "ok       settings: sizes fit 2 rank(s), and nothing is unusual" in lines


def test_sizes_are_those_of_the_planned_hosts(tmp_path, capsys):
    flags = ["--run.dir", str(tmp_path / "r"), "--data.root", "d", "--data.num-workers", "0", "--run.device", "cpu"]
    assert main(["doctor", *flags, "--nodes", "2", "--gpus-per-node", "4"]) == 0
    assert "shuffle: keys are shuffled within 256 samples, on 8 ranks of several hosts" in capsys.readouterr().out
    assert main(["doctor", *flags, "--nodes", "2", "--gpus-per-node", "4", "--shuffle.block-size", "128"]) == 0
    assert "sizes fit 8 rank(s)" in capsys.readouterr().out
    assert main(["doctor", *flags, "--nodes", "3", "--gpus-per-node", "8"]) == 1
    out = capsys.readouterr().out
    assert "error    sizes: optim.global_batch_size 256 is not a multiple of 768 = 24 rank(s)" in out
    assert main(["doctor", *flags, "--nodes", "2", "--gpus-per-node", "64", "--data.num-workers", "1"]) == 1
    assert "cores: 64 rank(s) with 1 workers want 128" in capsys.readouterr().out
    for words, line in [
        (["--nodes", "0"], "--nodes 0 is not greater than 0"),
        (["--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
        (["--run", "r", "--nodes", "2"], "--run takes a folder alone"),
        (["configs/linear_r50_100ep.yaml", "--nodes", "2"], "an evaluation is checked without them"),
    ]:
        assert main(["doctor", *words]) == 2
        err = capsys.readouterr().err
        assert line in err
        assert err.count("\n") == 1


def test_settings_of_an_evaluation_have_no_section(tmp_path, capsys):
    """They are told from this command's own arguments, and a misspelt one has the nearest of both as its hint."""
    linear, finetune = tmp_path / "linear.yaml", tmp_path / "finetune.yaml"
    linear.write_text("run_dir: r\nlr: 30\nmilestones: [60]\n")
    finetune.write_text("run_dir: r\nbackbone_lr: 0.01\nclassifier_lr: 1\n")
    assert main(["doctor", str(linear), "--lr", "0.1"]) == 0
    assert "warning" in capsys.readouterr().out
    assert main(["doctor", str(finetune), "--run-dir=s", "--classifier_lr", "0.001"]) == 0
    assert "warning" in capsys.readouterr().out
    both, knn = tmp_path / "both.yaml", tmp_path / "knn.yaml"
    both.write_text("run_dir: r\nepochs: 20\nmilestones: [12, 16]\n")  # of both, and the flag says which
    knn.write_text("run_dir: r\n")
    assert main(["doctor", str(both), "--backbone-lr=0.1"]) == 0
    assert "backbone 0.1, classifier 1" in capsys.readouterr().out
    assert main(["doctor", str(knn), "--temperature", "0.1"]) == EXIT_MISTAKE
    assert "is one of moco-dist knn" in capsys.readouterr().err
    for words, hint in [
        ([linear, "--epoch", "3"], "did you mean --epochs?"),
        ([linear, "--nodse", "2"], "did you mean --nodes?"),
        (["--run-dir", "s"], "did you mean --run.dir?"),
    ]:
        assert main(["doctor", *map(str, words)]) in (1, 2)
        told = "".join(capsys.readouterr())
        assert hint in told, told


def test_a_precision_that_is_slow_here(monkeypatch):
    monkeypatch.setattr(machine, "num_gpus", lambda: 0)
    config = PretrainConfig.model_validate({"run": {"dir": "r"}, "data": {"root": "d"}, "optim": {"precision": "fp16"}})
    assert [f.level for f in machine.check(config, 1, 1) if f.about == "precision"] == ["warning"]
    assert machine.precision("bf16", "cpu") == machine.precision("auto", "auto") == []
    monkeypatch.setattr(machine, "num_gpus", lambda: 1)
    assert machine.precision("fp16", "auto") == []
    assert machine.precision("fp16", "cpu") != []


def test_missing_packages(monkeypatch):
    for name in ("nvidia.dali", "deepspeed", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)
    found = machine.packages(config_of(
        "--data.loader", "dali", "--engine.kind", "deepspeed", "--tracking.uri", "postgresql+psycopg2://h/d"
    ))  # fmt: skip
    assert [f.about for f in found] == ["dali", "deepspeed", "psycopg2"]
    assert all(f.level == "error" and "pip install" in f.text for f in found)
    assert machine.packages(config_of("--tracking.backend", "none"))[0].level == "ok"


def test_disk_and_run_folder(monkeypatch, tmp_path):
    config = config_of("--run.dir", str(tmp_path / "new" / "run"))
    assert machine.disk(config, 1).level == "ok"
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert machine.disk(config, 1).level == "error"
    assert "checkpoints take 1.1 GB" in machine.disk(config, 1).text


def test_a_tracking_uri_that_a_run_refuses(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for uri, told in (("mlruns", "tracking.uri mlruns is neither"), ("sqlite:///$HOME/m.db", "has $HOME, which only")):
        found = network.mlflow_server(TrackingConfig(uri=uri))
        assert found.level == "error" and told in found.text
    assert network.mlflow_server(TrackingConfig()).level == "ok"


def test_mlflow_that_does_not_answer_or_is_something_else():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://someone:hunter2@127.0.0.1:{probe.getsockname()[1]}"
        found = network.mlflow_server(TrackingConfig(uri=uri))
    assert found.level == "error"
    assert "does not answer" in found.text
    assert "hunter2" not in found.text

    class Answers(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self):
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        config = TrackingConfig(uri=f"http://127.0.0.1:{server.server_port}")
        for Answers.status, level in ((200, "ok"), (401, "ok"), (404, "error")):
            assert network.mlflow_server(config).level == level
        server.shutdown()
        thread.join()


def test_interfaces(tmp_path):
    for name in ("lo", "eth0", "ib0", "docker0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text("up\n")

    def found(**env):
        return [(f.level, f.text) for f in network.interfaces(env, tmp_path)]

    assert "NCCL_SOCKET_IFNAME=eth0" in found()[0][1]
    assert found(NCCL_SOCKET_IFNAME="ib")[0][0] == "ok"
    assert found(NCCL_SOCKET_IFNAME="^docker,lo")[0][0] == "ok"
    assert found(NCCL_SOCKET_IFNAME="=ib")[0][0] == "error"
    level, text = found(NCCL_SOCKET_IFNAME="eth", GLOO_SOCKET_IFNAME="eth")[0]
    assert level == "error"
    assert "GLOO_SOCKET_IFNAME=eth: this host has no eth" in text


def test_clocks():
    assert network.clocks({"a": 1000.0, "b": 1000.2}).level == "ok"
    found = network.clocks({"a": 1000.0, "b": 1007.5})
    assert found.level == "warning"
    assert "a is 7.5 s behind b" in found.text


def test_the_cache(tmp_path, monkeypatch):
    def found(*flags):
        return machine.cache(config_of("--data.root", "s3://bucket/set", *flags))

    assert found() == []
    folder = tmp_path / "not" / "there" / "yet"
    (fine,) = found("--data.cache-dir", str(folder))
    assert fine.level == "ok" and "GB free, and holds 0.0 GB" in fine.text
    (small,) = found("--data.cache-dir", str(folder), "--data.cache-bytes", str(10**18))
    assert small.level == "warning" and "less than data.cache_bytes (1,000,000,000.0 GB)" in small.text
    (unused,) = machine.cache(config_of("--data.cache-dir", str(folder)))
    assert unused.text == "data.cache_dir is not used: data.root is no address"
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    (closed,) = found("--data.cache-dir", str(folder))
    assert closed.level == "warning" and "cannot be written" in closed.text
