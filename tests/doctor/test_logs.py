"""Logs of runs that went wrong in the known ways, and of one that did not, as the program itself writes them."""

import math
import re

import pytest
import torch

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import to_yaml
from moco_dist.distributed.world import World
from moco_dist.doctor.finding import text
from moco_dist.doctor.logs import run
from moco_dist.errors import EXIT_MISTAKE, UserError
from moco_dist.run import logbook
from moco_dist.run.logbook import Logbook, read_log
from tests.faults.processes import TINY

QUEUE, BATCH = 1024, 64  # full of real keys after 16 steps
CHANCE = math.log(QUEUE + 1)


HEALTHY = {"lr": 0.03, "contrastive_top1": 30.0, "embedding_std": 0.8, "images_per_second": 200.0,
           "data_wait_share": 0.01}  # fmt: skip
REAL = [*TINY, "--checkpoint.every-steps", "2"]


@pytest.fixture
def write(monkeypatch):
    """A function that lets the program's own Logbook write rows, a line every ten steps; the clock is ours."""
    now = [0.0]
    monkeypatch.setattr(logbook.time, "perf_counter", lambda: now[0])

    def write(config, rows):
        book = Logbook(config, World(), 0, 10 * len(rows))
        for i, row in enumerate(rows):
            seconds = 10 * config.optim.global_batch_size / row["images_per_second"]
            for _ in range(10):
                book.add(torch.tensor(row["loss"], dtype=torch.float64), row["data_wait_share"] * seconds / 10)
            now[0] += seconds
            scalars = {name: torch.tensor(row[name]) for name in ("contrastive_top1", "embedding_std")}
            book.write(10 * (i + 1), 0.1 * i, row["lr"], scalars)
        book.close()
        written = read_log(config.run.dir)
        assert [row["loss"] for row in written] == pytest.approx([row["loss"] for row in rows])
        assert [row["images_per_second"] for row in written] == pytest.approx(
            [row["images_per_second"] for row in rows]
        )

    return write


@pytest.fixture
def diagnose(tmp_path, write):
    def diagnose(*rows, bn_group_size=32):
        config = PretrainConfig.model_validate({
            "run": {"dir": str(tmp_path)}, "data": {"root": "d"}, "moco": {"queue_size": QUEUE},
            "optim": {"global_batch_size": BATCH}, "model": {"bn_group_size": bn_group_size},
        })  # fmt: skip
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        checkpoint = tmp_path / "checkpoints" / "step_00000100"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "checkpoint.json").write_text("{}")
        write(config, [{**HEALTHY, **row} for row in rows])
        return [(f.level, f.about, f.text) for f in run(tmp_path)]

    return diagnose


FALLING = [{"loss": 6 - 0.05 * i} for i in range(40)]


def test_rows_are_those_that_a_run_writes_and_one_that_diverged_is_an_error(tmp_path, tiny_data, capsys):
    def pretrain(*flags):
        return main(["pretrain", "--data.root", str(tiny_data), "--run.dir", str(tmp_path / "run"), *REAL, *flags])

    assert pretrain("--run.stop-at-step", "2") == 0
    (row,) = read_log(tmp_path / "run")
    assert row.keys() >= {"step", "loss", *HEALTHY}
    assert [f.level for f in run(tmp_path / "run")] == ["ok"]
    words = ["--optim.base-lr", "1e20", "--run.resume", "changed"]
    assert pretrain(*words) == EXIT_MISTAKE
    told = re.search(r"loss is (\w+) at step (\d+)", capsys.readouterr().err)
    (found,) = run(tmp_path / "run")
    assert (found.level, found.about) == ("error", "loss")
    assert f"{told[1]} at step {told[2]}, which ended the run" in found.text
    assert main(["doctor", "--run", str(tmp_path / "run")]) == 1
    assert pretrain("--run.stop-at-step", "6") == 0  # it goes on from the checkpoint
    assert "which ended the run" not in text(run(tmp_path / "run"))


def test_a_run_that_diverged_at_its_first_step(tmp_path, tiny_data):
    words = ["--data.root", str(tiny_data), "--run.dir", str(tmp_path / "run"), *TINY, "--log.every-steps", "50"]
    assert main(["pretrain", *words, "--optim.base-lr", "1e20"]) == EXIT_MISTAKE
    assert run(tmp_path / "run")[0].text.startswith("nan at step ")


def test_a_healthy_run(diagnose):
    assert diagnose(*FALLING)[0][0] == "ok"
    assert len(diagnose(*FALLING)) == 1


def test_loss_at_chance(diagnose):
    ((level, about, text),) = diagnose(*[{"loss": CHANCE + 0.05, "contrastive_top1": 0.1}] * 20)
    assert (level, about) == ("error", "chance")
    assert f"ln(K + 1) = {CHANCE:.3f}" in text


def test_collapse(diagnose):
    found = diagnose(*[{"loss": CHANCE, "embedding_std": 0.001, "contrastive_top1": 50.0}] * 20)
    assert [f[:2] for f in found] == [("error", "collapse")]
    assert "optim.warmup_epochs" in found[0][2]


def test_a_rising_loss_is_normal_while_the_queue_fills_and_not_later(diagnose):
    ((level, _, text),) = diagnose({"loss": 4.0}, {"loss": 5.0}, {"loss": 5.8})
    assert level == "ok"
    assert "normal" in text
    assert "step 16" in text
    ((level, about, text),) = diagnose(*[{"loss": 4 + 0.05 * i} for i in range(40)])
    assert (level, about) == ("warning", "loss")
    assert "optim.base_lr" in text


@pytest.mark.parametrize(("share", "level"), [(0.2, "warning"), (0.8, "error")])
def test_waiting_for_data(diagnose, share, level):
    ((found, about, text),) = diagnose(*[{**row, "data_wait_share": share} for row in FALLING])
    assert (found, about) == (level, "data")
    assert f"{100 * share:.0f} %" in text
    assert "num_workers" in text


def test_other_things_that_go_wrong(diagnose, tmp_path):
    slow = [{**row, "images_per_second": 90.0 if i >= 35 else 200.0} for i, row in enumerate(FALLING)]
    assert diagnose(*slow)[0][:2] == ("warning", "speed")
    cheating = [{**row, "contrastive_top1": 99.0} for row in FALLING]
    assert diagnose(*cheating) == diagnose(*FALLING)
    assert diagnose(*cheating, bn_group_size=BATCH)[0][:2] == ("error", "BN groups")
    assert diagnose()[0][:2] == ("warning", "log")
    with pytest.raises(UserError, match="not the folder of a run"):
        run(tmp_path / "nothing")
