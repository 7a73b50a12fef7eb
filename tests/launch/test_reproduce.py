"""`reproduce --launcher`: what it renders, and what it gives to stand-ins for Slurm, kubectl and torchrun."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from moco_dist.cli.main import main
from moco_dist.config.evaluate import LinearConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.reproduce import tables as reproduce
from tests.launch.schemas import problems

RESULT = {"step": 1, "num_train": 8, "num_val": 8}  # what an evaluation writes beside its accuracy
EIGHT = ["--nodes", "1", "--gpus-per-node", "8"]
STUBS = {
    # Numbers from 1 on; every script is kept, with the flags it came with.
    "sbatch": 'n=$(($(ls "$STUB"/*.sbatch 2>/dev/null | wc -l) + 1)); cat > "$STUB/$n.sbatch"\n'
    'echo "$@" > "$STUB/$n.flags"; echo $n',
    "sinfo": 'echo "gpu|4|infinite"',
    "squeue": 'cat "$STUB/queue" 2>/dev/null || true',
    "kubectl": 'if [ "$1" = get ]; then test -e "$STUB/$(basename "$4")"; exit; fi\n'
    'cat > "$STUB/manifest"; name=$(grep -m 1 -o "name: [a-z0-9-]*-config" "$STUB/manifest")\n'
    'name=${name#name: }; cp "$STUB/manifest" "$STUB/${name%-config}"; echo "trainjob/${name%-config}"',
}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A folder with the programs above first on the PATH, and where they leave what they were given."""
    folder = tmp_path / "stub"
    folder.mkdir()
    for name, script in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("STUB", str(folder))
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    rows = [row for row in reproduce.TABLES["table1"] if row.name in ("mocov1", "d")]
    monkeypatch.setitem(reproduce.TABLES, "table1", rows)
    return folder


def table(tmp_path, *flags):
    return main(["reproduce", "table1", "--out", str(tmp_path / "out"), "--data-root", str(tmp_path), *flags])


def finish(run_dir, accuracy=None):
    """Leave what a pre-training leaves at its end; with an accuracy, what its evaluation does."""
    (run_dir / "eval").mkdir(parents=True, exist_ok=True)
    (run_dir / "backbone.safetensors").touch()
    if accuracy is not None:
        (run_dir / "eval" / "linear_trained.json").write_text(
            json.dumps(RESULT | {"accuracy": {"linear_top1": accuracy}})
        )


def command_of(script):
    line = next(line for line in script.splitlines() if line.startswith("command=("))
    return shlex.split(line.removeprefix("command=(").removesuffix(")"))


def test_rows_go_to_slurm_once_and_are_collected(tmp_path, stub, capsys, monkeypatch):
    flags = ["--launcher", "slurm", "--partition", "gpu", *EIGHT]
    assert table(tmp_path, *flags) == 0
    scripts = [(stub / f"{number}.sbatch").read_text() for number in (1, 2, 3, 4)]
    assert [command_of(script)[0] for script in scripts] == ["pretrain", "linear", "pretrain", "linear"]
    assert [(stub / f"{number}.flags").read_text().split()[1:] for number in (2, 4)] == [
        [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"] for number in (1, 3)
    ]
    assert all("#SBATCH --gpus-per-node=8" in s and "#SBATCH --partition=gpu" in s for s in scripts)
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0

    (stub / "queue").write_text("1\n2\n4\n")  # of the second row, the evaluation alone still waits
    capsys.readouterr()
    assert table(tmp_path, *flags) == 0
    told = capsys.readouterr().out
    assert "MoCo v1, seed 0: waits or runs as job 1, 2" in told
    assert "cos, seed 0: waits or runs as job 4" in told
    assert not (stub / "5.sbatch").exists()

    # The first has come to its end; the second's pre-training has, but its evaluation has failed.
    finish(tmp_path / "out" / "mocov1_seed0", 60.25)
    finish(tmp_path / "out" / "d_seed0")
    (stub / "queue").write_text("")
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_: pytest.fail("nothing is to be run here"))
    assert table(tmp_path) == 0
    told = capsys.readouterr().out
    assert "cos, seed 0: left to slurm, job 3, 4" in told
    assert "| MoCo v1 | 60.6 | 60.25 | -0.35 |" in told
    monkeypatch.undo()


def test_what_has_failed_is_submitted_again_from_where_it_was(tmp_path, stub, capsys):
    flags = ["--launcher", "slurm", *EIGHT]
    assert table(tmp_path, *flags) == 0
    finish(tmp_path / "out" / "d_seed0")
    assert table(tmp_path, *flags) == 0
    again = [command_of((stub / f"{number}.sbatch").read_text())[0] for number in (5, 6, 7)]
    assert again == ["pretrain", "linear", "linear"]
    assert "--dependency" not in (stub / "7.flags").read_text()


def test_a_dry_run_shows_the_scripts_and_submits_nothing(tmp_path, stub, capsys):
    assert table(tmp_path, "--launcher", "slurm", *EIGHT, "--dry-run") == 0
    assert capsys.readouterr().out.count("#!/bin/bash") == 4
    assert not list(stub.glob("*.sbatch"))
    assert not (tmp_path / "out").exists()


def test_kubernetes_gets_the_evaluation_when_the_pretraining_has_ended(tmp_path, stub, capsys, monkeypatch):
    monkeypatch.setattr(reproduce.Trial, "is_pretrained", False)
    words = ["reproduce", "table1", "--out", "/runs/table1", "--data-root", "/data/imagenet", "--launcher",
             "kubernetes", "--image", "registry.example/moco-dist:0.1.0", *EIGHT, "--dry-run"]  # fmt: skip
    assert main(words) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [problem for document in documents for problem in problems(document)] == []
    jobs = [document for document in documents if document["kind"] == "TrainJob"]
    assert [job["metadata"]["name"] for job in jobs] == ["mocov1-seed0", "d-seed0"]
    assert jobs[0]["spec"]["trainer"]["args"][-2:] == ["pretrain", "/etc/moco-dist/config.yaml"]
    PretrainConfig.model_validate(yaml.safe_load(documents[0]["data"]["config.yaml"]))

    monkeypatch.setattr(reproduce.Trial, "is_pretrained", True)
    assert main(words) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [problem for document in documents for problem in problems(document)] == []
    jobs = [document for document in documents if document["kind"] == "TrainJob"]
    assert [job["metadata"]["name"] for job in jobs] == ["mocov1-seed0-linear", "d-seed0-linear"]
    assert jobs[0]["spec"]["trainer"]["args"][-2:] == ["linear", "/etc/moco-dist/config.yaml"]
    config = LinearConfig.model_validate(yaml.safe_load(documents[0]["data"]["config.yaml"]))
    assert (str(config.run_dir), config.lr, config.epochs) == ("/runs/table1/mocov1_seed0", 30, 100)


def test_kubernetes_is_asked_before_it_gets_a_job_again(tmp_path, stub, capsys, monkeypatch):
    monkeypatch.setattr("moco_dist.reproduce.submission._note", lambda *_: None)  # /runs is not here
    monkeypatch.setattr("moco_dist.cli.reproduce._write", lambda *_: None)
    words = ["reproduce", "table1", "--out", "/runs/table1", "--data-root", "/data/x", "--launcher", "kubernetes",
             "--image", "x", *EIGHT]  # fmt: skip
    assert main(words) == 0
    assert (stub / "mocov1-seed0").exists()
    assert "created trainjob/d-seed0" in capsys.readouterr().out
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "d-seed0 is there already; when it has ended, give this command again" in told
    assert "created" not in told


def test_torchrun_runs_both_commands_of_a_row_on_every_host(tmp_path, stub, monkeypatch, capsys):
    started = []

    def start(words):
        started.append(words[1:])
        if "linear" in words:
            finish(Path(words[words.index("--run-dir") + 1]), 50.0)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(reproduce.subprocess, "run", start)
    flags = ["--launcher", "torchrun", "--nodes", "2", "--gpus-per-node", "4", "--head", "node1"]
    assert table(tmp_path, *flags) == 0
    assert [words[words.index("moco_dist") + 1] for words in started] == ["pretrain", "linear", "pretrain", "linear"]
    assert shlex.join(started[1][:14]) == (
        "-m moco_dist.launchers.torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node1:29500 "
        "--rdzv-id mocov1-seed0-linear -m moco_dist"
    )
    assert "50.00 | -17.50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--launcher", "slrum"], "--launcher 'slrum' is not one of torchrun, slurm, kubernetes; did you mean slurm?"),
        (["--launcher", "slurm", "--partitoin", "gpu"], "unknown flag --partitoin; did you mean --partition?"),
        (["--launcher", "slurm", "--gpus-per-node", "16"], "global_batch_size 256 is not a multiple of 512"),
        (["--launcher", "slurm", "--partition", "cpu"], "partition cpu does not exist; gpu do"),
        (["--launcher", "kubernetes", *EIGHT], "image is required"),
        (["--launcher", "torchrun", "--nodes", "2"], "2 nodes need --head HOST[:PORT]"),
        (["--partition", "gpu"], "unrecognized arguments: --partition"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(tmp_path, stub, capsys, flags, line):
    assert table(tmp_path, *flags) == 2
    assert line in capsys.readouterr().err
    assert not list(stub.glob("*.sbatch"))
