"""The real command on two ranks: under DeepSpeed's launcher, with settings that differ, with sizes that do not fit."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config, to_yaml
from moco_dist.datasets.prepare import prepare_shapes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
TINY = [
    "--data.image-size", "32", "--data.num-workers", "0", "--model.arch", "resnet10",
    "--model.head-hidden-dims", "[16]", "--model.bn-group-size", "4", "--moco.queue-size", "96",
    "--optim.global-batch-size", "8", "--optim.epochs", "1", "--run.stop-at-step", "4", "--log.every-steps", "2",
    "--tracking.backend", "none",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=80, num_val=20)


def run_words(words, **environment):
    return subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True, timeout=200,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_deepspeeds_launcher_works_as_torchrun_does(data, tmp_path):
    """The same flags after another launcher, another engine: the same losses."""
    pytest.importorskip("deepspeed")
    words = ["-m", "moco_dist", "pretrain", "--data.root", str(data), *TINY]
    done = run_words([*TORCHRUN, *words, "--run.dir", str(tmp_path / "torchrun")])
    assert done.returncode == 0, done.stdout
    assert "warning: moco.queue_size 96 is larger than the data set (80)" in done.stdout
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", free_port()]
    zero = ["--engine.kind", "deepspeed", "--engine.zero-stage", "1"]
    done = run_words(
        [*launcher, "--module", *words[1:], *zero, "--run.dir", str(tmp_path / "deepspeed")],
        DS_ACCELERATOR="cpu", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "on 2 rank(s) of cpu" in done.stdout
    ours, theirs = losses(tmp_path / "deepspeed"), losses(tmp_path / "torchrun")
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_ranks_that_differ_are_named_before_the_first_step(data, tmp_path):
    """Rank 1 has another flag, another YAML file, another version of a package and an image less."""
    other_data = tmp_path / "other_data"
    shutil.copytree(data, other_data)
    next(path for path in (other_data / "train").rglob("*") if path.is_file()).unlink()
    (tmp_path / "packages" / "pillow-99.0.dist-info").mkdir(parents=True)
    (tmp_path / "packages" / "pillow-99.0.dist-info" / "METADATA").write_text("Name: pillow\nVersion: 99.0\n")
    files = {0.2: tmp_path / "0.yaml", 0.3: tmp_path / "1.yaml"}
    for temperature, file in files.items():
        flags = ["--data.root", str(data), "--run.dir", str(tmp_path / "run"), *TINY]
        file.write_text(to_yaml(read_config(PretrainConfig, None, [*flags, "--moco.temperature", str(temperature)])))
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
              "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    ranks = []
    for rank, (file, root, seed) in enumerate([(files[0.2], data, "0"), (files[0.3], other_data, "7")]):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rank:
            environment["PYTHONPATH"] = f"{tmp_path / 'packages'}:{os.environ.get('PYTHONPATH', '')}"
        words = [sys.executable, "-m", "moco_dist", "pretrain", str(file), "--data.root", str(root), "--run.seed", seed]
        ranks.append(subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT))  # fmt: skip
    for rank, process in enumerate(ranks):
        said = process.communicate(timeout=200)[0]
        assert process.returncode == 2, said
        for line in ("run.seed: 0 on rank 0; 7 on rank 1", "moco.temperature: 0.2 on rank 0; 0.3 on rank 1",
                     'version of pillow: "', 'number of images: 80 on rank 0; 79 on rank 1'):  # fmt: skip
            assert f"[rank {rank}] error: ranks disagree on {line}" in said
        assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("log.jsonl"))


def test_a_batch_that_ranks_do_not_divide_is_one_line(data, tmp_path):
    words = [*TORCHRUN, "-m", "moco_dist", "pretrain", "--data.root", str(data), "--run.dir", str(tmp_path / "run")]
    done = run_words([*words, *TINY, "--optim.global-batch-size", "12"])
    assert done.returncode != 0
    line = ("error: optim.global_batch_size 12 is not a multiple of 8 = 2 rank(s) x optim.grad_accum_steps 1 x "
            "model.bn_group_size 4; 8 and 16 are")  # fmt: skip
    for rank in (0, 1):
        assert f"[rank {rank}] {line}" in done.stdout


def test_a_data_root_that_is_missing_is_said_by_one_rank(data, tmp_path):
    """As all errors are that the first rank of a host finds for the others."""
    done = run_words([*TORCHRUN, "-m", "moco_dist", "pretrain", "--run.dir", str(tmp_path / "run"), *TINY,
                      "--data.root", f"{data}s"])  # fmt: skip
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if "] error: " in line]
    assert errors == [f"[rank 0] error: data root {data}s is not a folder; did you mean {data.name}?"]
