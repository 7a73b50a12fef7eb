"""A plan: times only from measurements of that very hardware and those very settings, and a bottleneck that moves."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.datasets.prepare import prepare_shapes
from moco_dist.doctor.settings import pretraining
from moco_dist.planning import measurements
from moco_dist.planning.arithmetic import sizes
from moco_dist.planning.forecast import Forecast, weak_scaling
from moco_dist.planning.measurements import Measurement
from tests.planning.config import config_of

FLAGS = ["--model.arch", "resnet10", "--data.image-size", "32", "--moco.queue-size", "512", "--run.dir", "r",
         "--model.head-hidden-dims", "[64]", "--optim.global-batch-size", "64", "--model.bn-group-size", "8",
         "--data.root", "nowhere", "--run.device", "cpu"]  # fmt: skip


def measured(config=None, **facts):
    return Measurement(**{
        "hardware": "NVIDIA H100 80GB HBM3", "date": "2026-11-01",
        "settings": measurements.settings_of(config or config_of()),
        "local_batch": 32, "world_size": 1, "num_nodes": 1, "parts": {"step": 0.1, "backward": 0.05}, "peak_bytes": 0,
        "loader_core_seconds": None, "loader_world_size": 1, "all_reduce_bytes": 4, "all_reduce_seconds": 0.0,
        "latency_seconds": 0.0, **facts,
    })  # fmt: skip


def plan(capsys, folder, *flags):
    status = main(["plan", *FLAGS, "--measurements", str(folder), *flags])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_without_a_measurement_there_is_no_time(capsys, tmp_path):
    status, out, _ = plan(capsys, tmp_path, "--gpu", "h100", "--nodes", "2", "--num-images", "6400")
    assert status == 0
    assert "not measured on h100: run with --calibrate there" in out
    assert "give --link-gigabit-per-second" in out
    assert "20,000 = 200 epochs x 100" in out
    assert " ms" not in out
    assert "hours" not in out


def test_a_run_that_is_too_short_for_its_set_is_told_as_the_doctor_tells_it(capsys, tmp_path):
    config = read_config(PretrainConfig, None, [*FLAGS, "--optim.epochs", "1"])
    (line,) = [found.text for found in pretraining(config, 1, 1, 6400) if found.about == "too short"]
    assert "of the key encoder is still the untrained one; --moco.momentum 0.9, or more epochs" in line
    _, out, _ = plan(capsys, tmp_path, "--optim.epochs", "1", "--num-images", "6400")
    assert line in out
    assert "too short" not in plan(capsys, tmp_path, "--optim.epochs", "50", "--num-images", "6400")[1]
    method = ["--method", "simclr"]  # it keeps nothing from step to step
    assert "too short" not in plan(capsys, tmp_path, "--optim.epochs", "1", "--num-images", "6400", *method)[1]


def test_a_calibration_is_kept_and_used_for_these_settings_alone(capsys, tmp_path):
    kept = measurements.write(measured(local_batch=64), {}, "test", tmp_path)
    assert json.loads(kept.read_text())["theme"] == "calibration"
    assert measurements.read([tmp_path]) == [measured(local_batch=64, path=str(kept))]
    _, out, _ = plan(capsys, tmp_path, "--gpu", "h100", "--num-images", "6400")
    assert "640 images/s" in out
    assert "0.6 hours" in out
    assert str(kept) in out
    for other in (["--gpu", "a100"], ["--gpu", "h100", "--model.arch", "resnet18"], ["--optim.precision", "bf16"]):
        assert "images/s" not in plan(capsys, tmp_path, *other)[1]
    assert "measured are: NVIDIA H100" in plan(capsys, tmp_path, "--gpu", "a100")[1]


def test_a_result_of_the_loader_s_benchmark_stands_in_for_a_calibration(capsys, tmp_path):
    def row(name, milliseconds):
        return {"name": name, "cpu_ms_per_image": milliseconds}

    names = {"loader torchvision": 2.0, "loader ffcv, JPEGs": 1.0, "loader dali, decoding on the CPU": None}
    rows = [row(name, milliseconds) for name, milliseconds in names.items()]
    facts = {"date": "2026-11-02", "hardware": "8 cores of a CPU", "crop_size": 32, "image_size": [500, 375],
             "mean_file_bytes": 54_627, "rows": rows}  # fmt: skip
    (tmp_path / "loader_new.json").write_text(json.dumps(facts))
    older = {**facts, "date": "2025-01-01", "rows": [row("loader torchvision", 9.0)]}
    (tmp_path / "loader_old.json").write_text(json.dumps(older))
    other = {"theme": "loader_parts", "rows": [{"part": "decoding"}]}  # a benchmark whose name only begins so
    (tmp_path / "loader_parts_x.json").write_text(json.dumps(other))
    _, out, _ = plan(capsys, tmp_path, "--nodes", "2")
    assert "2.00 core-ms a file" in out
    path = tmp_path / "loader_new.json"
    assert f"measured 2026-11-02 on 8 cores of a CPU ({path}): files of 500 x 375 px and 55 kB" in out
    measurements.write(measured(), {}, "test", tmp_path)  # the step, and not the loader
    _, out, _ = plan(capsys, tmp_path, "--nodes", "2", "--link-gigabit-per-second", "1000")
    assert "1.0 a GPU, 1 a host" in out  # 2 hosts: 48 files a rank and step of 0.1 s
    assert "1.00 core-ms a file" in plan(capsys, tmp_path, "--data.loader", "ffcv")[1]
    for loader, side in (("dali", 32), ("torchvision", 64)):
        _, out, _ = plan(capsys, tmp_path, "--data.loader", loader, "--data.image-size", str(side))
        assert f"no result of benchmarks/loader.py for {loader} at {side} px in {tmp_path})" in out
    (tmp_path / "loader_new.json").write_text("[]")
    assert "is not a result of benchmarks/loader.py" in plan(capsys, tmp_path)[2]


def test_mistakes(capsys, tmp_path):
    assert plan(capsys, tmp_path, "--nodes", "3")[0] == 2
    assert "--nodes 0 is not greater" in plan(capsys, tmp_path, "--nodes", "0")[2]
    assert "this machine has" in plan(capsys, tmp_path, "--calibrate", "--gpu", "h100")[2]
    (tmp_path / "calibration_x.json").write_text("{")
    assert "not a calibration" in plan(capsys, tmp_path)[2]


def test_the_bottleneck_is_what_is_slowest():
    planned = sizes(config_of(), 2, 1)
    gradients = planned.received()["gradients"]

    def forecast(seconds_for_gradients, loader=None):
        return Forecast(planned, measured(), gradients / seconds_for_gradients, 0.0, loader, workers=2)

    assert forecast(0.001).bottleneck().startswith("computing")
    assert forecast(10).bottleneck().startswith("network")
    assert forecast(0.001, loader=1.0).bottleneck().startswith("loading")
    assert forecast(0.001, loader=1.0).step_seconds() == 0.5
    fast, slow = forecast(0.001), forecast(10)
    # Short transfers hide behind the backward pass but for the last bucket; long ones stick out by all but its length.
    features = planned.received()["features"] / gradients
    share = planned.last_bucket_share
    assert fast.waited_for_network() == pytest.approx(0.001 * (share + features))
    assert slow.waited_for_network() == pytest.approx(10 * (1 + features) - 0.05)


def test_scaling_falls_with_a_slower_link_and_is_unknown_without_one():
    planned = dataclasses.replace(sizes(config_of(), 2, 2))
    rows = dict(weak_scaling(planned, measured(), 1e10, 1e9, 0.0))
    slower = dict(weak_scaling(planned, measured(), 1e10, 1e8, 0.0))
    assert list(rows) == [2**i for i in range(11)]
    assert rows[1] == 1
    assert all(rows[n] > slower[n] for n in rows if n > 2)
    assert rows[2] == slower[2]
    assert list(weak_scaling(planned, measured(), None, None, 0.0))[1:] == [(2**i, None) for i in range(1, 11)]


@pytest.mark.slow
def test_calibration_of_the_real_step(capsys, tmp_path, monkeypatch):
    from moco_dist.planning import calibrate

    monkeypatch.setattr(calibrate, "MAX_STEPS", 3)
    status, out, err = plan(capsys, tmp_path, "--calibrate", "--num-images", "6400", "--tracking.backend", "none")
    assert status == 0, err
    assert "hours" in out
    (kept,) = measurements.read([tmp_path])
    parts = dict(kept.parts)
    whole = parts.pop("step")
    assert set(parts) == {"colours", "query forward", "backward", "optimiser", "keys, loss, queue"}
    assert all(0 < seconds < 3 * whole for seconds in parts.values())
    assert kept.loader_core_seconds is None  # no images there


FEW_STEPS = """
import sys
from moco_dist.cli.main import main
from moco_dist.planning import calibrate
calibrate.MAX_STEPS = 3
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_ranks_of_torchrun_measure_the_links_too(tmp_path):
    data = prepare_shapes(tmp_path / "shapes", num_train=128, num_val=10)
    (tmp_path / "command.py").write_text(FEW_STEPS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["plan", *FLAGS, "--data.root", str(data), "--gpus-per-node", "2", "--calibrate", "--measurements",
             str(tmp_path / "kept")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*torchrun, str(tmp_path / "command.py"), *words], env=environment, timeout=200,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (kept,) = measurements.read([tmp_path / "kept"])
    planned = sizes(config_of(), 2, 2)
    assert (kept.world_size, kept.num_nodes, kept.local_batch) == (2, 1, 32)
    assert kept.all_reduce_bytes == planned.parameters * 4
    assert kept.all_reduce_seconds > kept.latency_seconds > 0
    assert kept.loader_core_seconds > 0
    assert done.stdout.count("kept:") == done.stdout.count("whole schedule") == 1  # one rank tells it
    assert re.search(r"gradients +\S+ MB, \S+ m?s ", done.stdout)
    assert "400 = 200 epochs x 2" in done.stdout
    assert "not measured" not in done.stdout
    assert re.search(r"1: 100 %  2: \d+ %  4: \?", done.stdout)


def test_what_is_kept_of_a_store(capsys, tmp_path):
    store = ["--data.root", "s3://bucket/set", "--num-images", "640"]
    assert "no: every epoch fetches all images anew" in plan(capsys, tmp_path, *store)[1]
    cached = [*store, "--data.cache-dir", "c"]
    assert "up to nine tenths of what is free of a host's disk" in plan(capsys, tmp_path, *cached)[1]
    assert (
        "up to 150.00 GB of a host's disk" in plan(capsys, tmp_path, *cached, "--data.cache-bytes", "150000000000")[1]
    )
    assert "images kept on disk" not in plan(capsys, tmp_path)[1]
