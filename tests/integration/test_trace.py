"""`log.profile_steps`: a trace of the steps that were asked for, which changes no number and ends nothing."""

import gzip
import json
import signal
from types import SimpleNamespace

import pytest
import torch

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.errors import EXIT_PREEMPTED
from moco_dist.run import trace as trace_module
from moco_dist.run.logbook import read_log
from moco_dist.run.trace import StepTrace
from tests.faults.processes import TINY, losses, wait_for_step


def events(path):
    with gzip.open(path) as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]


@pytest.fixture
def pretrain(tiny_data, tmp_path):
    def start(name, *flags, stop=6):
        words = ["--data.root", str(tiny_data), "--run.dir", str(tmp_path / name), *TINY, "--log.every-steps", "1"]
        assert main(["pretrain", *words, "--run.stop-at-step", str(stop), *flags]) == 0
        return tmp_path / name

    return start


@pytest.mark.slow
def test_the_steps_that_were_asked_for_are_traced_and_no_number_changes(pretrain, capsys):
    plain, traced = pretrain("plain"), pretrain("traced", "--log.profile-steps", "[3, 4]")
    assert losses(traced) == losses(plain)
    path = traced / "profile" / "steps_3_4.json.gz"
    assert f"wrote {path}: steps 3 to 4" in capsys.readouterr().out
    assert [path.name for path in path.parent.iterdir()] == [path.name]
    names = events(path)
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2
    assert "aten::conv2d" in names
    rows = read_log(traced)
    assert all(row["memory_bytes"] > 50e6 for row in rows)


@pytest.mark.slow
def test_a_run_that_ends_or_begins_in_the_midst_traces_what_it_does(pretrain):
    run_dir = pretrain("run", "--log.profile-steps", "[2, 9]", stop=3)
    assert sum(name.startswith("Optimizer.step#") for name in events(run_dir / "profile" / "steps_2_3.json.gz")) == 2
    pretrain("run", "--log.profile-steps", "[2, 5]")
    names = sorted(path.name for path in (run_dir / "profile").iterdir())
    assert names == ["steps_2_3.json.gz", "steps_4_5.json.gz"]


@pytest.mark.slow
def test_a_stop_in_the_midst_leaves_the_trace_and_the_run(start, tmp_path):
    process = start(tmp_path / "run", "--log.profile-steps", "[2, 100000]", ranks=1)
    wait_for_step(process, tmp_path / "run", 4)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_PREEMPTED, output
    (path,) = (tmp_path / "run" / "profile").iterdir()
    assert path.name.startswith("steps_2_") and "aten::conv2d" in events(path)
    assert "Traceback" not in output


def trace_of(tmp_path, rank=0, tracker=None, said=None):
    config = PretrainConfig.model_validate(
        {"run": {"dir": tmp_path}, "data": {"root": "d"}, "log": {"profile_steps": [2, 3]}}
    )
    tracker = tracker or SimpleNamespace(log_artifact=lambda *_: None)
    return StepTrace(config, World(rank, rank, 2, 2), tracker, (said if said is not None else []).append)


def test_the_tracker_gets_it_and_other_ranks_do_nothing(tmp_path):
    told = []
    trace = trace_of(tmp_path, tracker=SimpleNamespace(log_artifact=lambda *given: told.append(given)))
    for step in range(5):
        trace.reached(step)
        torch.ones(3).add(1)
    trace.close()
    path = tmp_path / "profile" / "steps_2_3.json.gz"
    assert told == [(path, "profile")]
    assert events(path).count("aten::add") == 2
    other = trace_of(tmp_path / "other", rank=1)
    other.reached(1)
    other.close()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("when", ["start", "export_chrome_trace"])
def test_a_profiler_that_fails_is_told_and_ends_nothing(tmp_path, monkeypatch, when):
    def refuse(*_):
        raise RuntimeError("no device driver")

    said = []
    monkeypatch.setattr(trace_module.profile, when, refuse)
    trace = trace_of(tmp_path, said=said)
    for step in range(5):
        trace.reached(step)
    trace.close()
    assert {text.partition(":")[0] for text in said} == {"warning"} and "no device driver" in said[0]
    assert not list(tmp_path.rglob("*.gz*"))


def test_steps_in_another_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the first step, 3, comes after the last, 2"):
        PretrainConfig.model_validate(
            {"run": {"dir": tmp_path}, "data": {"root": "d"}, "log": {"profile_steps": [3, 2]}}
        )
