"""A table is run, gone on with after an interruption, and written beside the published numbers."""

import json
from pathlib import Path

import pytest

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.datasets.prepare import prepare_shapes
from moco_dist.planning import table3
from moco_dist.reproduce import tables as reproduce
from moco_dist.reproduce.tables import TABLES, as_markdown, trials_of

RESULT = {"step": 1, "num_train": 8, "num_val": 8}  # what an evaluation writes beside its accuracy
SMALL = ["--scale", "small", "--small-epochs", "1"]


def planned(table, capsys, *flags):
    assert main(["reproduce", table, "--dry-run", *flags]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_a_config_that_loads(table, scale, tmp_path):
    for job in trials_of(table, scale, [0, 1], tmp_path, Path("configs"), None, 8):
        words = job.commands[0][1:]
        files = [Path(word) for word in words if word.endswith(".yaml")]
        config = read_config(PretrainConfig, files[0], words[len(files) :], files[1:])
        assert config.run.seed == job.seed
        if scale == "full":
            assert config.model.arch == "resnet50"


def test_the_temperatures_are_those_of_the_paper(capsys):
    lines = [line for line in planned("temperature", capsys) if " pretrain " in line]
    taus = [float(line.split("--moco.temperature ")[1].split()[0]) for line in lines]
    assert taus == 2 * [0.07, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert [row.published for row in TABLES["temperature"]][:3] == [60.6, 60.7, 59.0]


@pytest.mark.slow
def test_a_table_is_run_and_gone_on_with(tmp_path, monkeypatch, capfd):
    """Two rows of Table 1, on 40 shapes; the second evaluation fails at first."""
    data = prepare_shapes(tmp_path / "shapes", num_train=40, num_val=20)
    monkeypatch.setitem(reproduce.TABLES, "table1", [row for row in TABLES["table1"] if row.name in ("mocov1", "d")])
    monkeypatch.setattr(reproduce, "SMALL_BATCH", 32)
    words = ["reproduce", "table1", *SMALL, "--data-root", str(data), "--out", str(tmp_path / "out")]
    hidden = tmp_path / "out" / "d_seed0" / "eval"
    hidden.parent.mkdir(parents=True)
    hidden.write_text("a file where a folder should be")
    assert main(words) == 74  # as that of the command that failed
    assert "error: linear of (d) MLP, aug+, cos ended with" in capfd.readouterr().err
    table = (tmp_path / "out" / "table1.md").read_text()
    v1, d = (line for line in table.splitlines() if line.startswith(("| MoCo v1", "| (d)")))
    assert v1.split(" | ")[2] != "–"
    assert d.split(" | ")[2] == "–"
    hidden.unlink()
    assert main(words) == 0
    printed = capfd.readouterr().out
    assert printed.count("already done") == 1
    assert "the numbers cannot" in printed
    accuracy = json.loads((tmp_path / "out/d_seed0/eval/linear_trained.json").read_text())["accuracy"]["linear_top1"]
    assert f"| (d) MLP, aug+, cos | 67.5 | {accuracy:.2f} | – |" in (tmp_path / "out" / "table1.md").read_text()


def test_seeds_are_averaged(tmp_path):
    jobs = trials_of("table1", "full", [0, 1, 2], tmp_path, Path("configs"), None, 8)
    for job, accuracy in zip(jobs[:3], (60.0, 61.0, 62.0), strict=True):
        (job.run_dir / "eval").mkdir(parents=True)
        (job.run_dir / "eval" / "linear_trained.json").write_text(
            json.dumps(RESULT | {"accuracy": {"linear_top1": accuracy}})
        )
    row = next(line for line in as_markdown(jobs, "full").splitlines() if "MoCo v1" in line)
    assert row.startswith("| MoCo v1 | 60.6 | 61.00 ± 1.00 (3 seeds) | +0.40 |")


def test_memory_and_time_stand_beside_the_published(tmp_path, monkeypatch, capsys):
    def measure(configs, batches, device, steps, rounds, kept):
        assert {method: config.method for method, config in configs.items()} == {"MoCo": "moco", "end to end": "simclr"}
        return [{"method": m, "local_batch": 32, "peak_bytes": 4e9, "step_seconds": 0.5} for m in configs]

    monkeypatch.setattr(table3, "measure", measure)
    for scale, network in (("full", "resnet50, 224 px"), ("small", "resnet10, 28 px")):
        assert main(["reproduce", "table3", "--scale", scale, "--out", str(tmp_path)]) == 0
        table = (tmp_path / "table3.md").read_text()
        assert table in capsys.readouterr().out
        assert "| MoCo | 32 | 256 | 4.00 | 1.00 | 0.500 | 1.00 | 5.0 | 53 |" in table
        assert network in table


def test_mistakes_are_one_line(capsys):
    cases = [
        (["table9"], "did you mean table"),
        (["table3", "--ranks", "8"], "times one rank"),
        (["table1", "--scale", "smal"], "did you mean small?"),
        (["table1", "--seeds", "a,b"], "not a list of whole numbers"),
        (["table1", "--ranks", "0"], "at least 1"),
        (["table1", "--configs", "nowhere"], "is not a folder"),
    ]
    for words, expected in cases:
        assert main(["reproduce", *words]) == 2
        error = capsys.readouterr().err
        assert expected in error, error
        assert error.count("\n") == 1
