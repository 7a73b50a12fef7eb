"""Memory and time beside the published numbers."""

import pytest
import torch

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.errors import Preempted
from moco_dist.planning import table3
from moco_dist.planning.table3 import as_markdown, measure


def rows_of(*values):
    return [
        {"method": method, "local_batch": batch, "peak_bytes": peak, "step_seconds": seconds}
        for method, batch, peak, seconds in values
    ]


def test_ours_beside_the_published():
    rows = rows_of(("MoCo", 32, 4e9, 0.2), ("end to end", 32, 6e9, 0.25), ("MoCo", 512, 30e9, 2.0),
                   ("end to end", 512, None, None))  # fmt: skip
    table = as_markdown(rows).splitlines()
    assert table[2] == "| MoCo | 32 | 256 | 4.00 | 1.00 | 0.200 | 1.00 | 5.0 | 53 |"
    assert table[3] == "| end to end | 32 | 256 | 6.00 | 1.50 | 0.250 | 1.25 | 7.4 | 65 |"
    assert table[4] == "| MoCo | 512 | 4,096 | 30.00 | 1.00 | 2.000 | 1.00 | – | – |"
    assert table[5] == "| end to end | 512 | 4,096 | does not fit | – | does not fit | – | 93 (est.) | – |"
    assert as_markdown(rows_of(("MoCo", 32, None, None), ("end to end", 32, 6e9, 1.0))).count("does not fit") == 2


def test_methods_take_turns_and_one_that_does_not_fit_is_tried_once(monkeypatch):
    calls = []

    def alone(config, batch, steps, device):
        calls.append((config, batch))
        return None if (config, batch) == ("e", 64) else (len(calls), 1.0)

    monkeypatch.setattr(table3, "_alone", alone)
    rows = measure({"MoCo": "m", "end to end": "e"}, [32, 64], "cpu", 1, 2)
    assert calls == [("m", 32), ("e", 32), ("m", 64), ("e", 64), ("m", 32), ("e", 32), ("m", 64)]
    assert [row["peak_bytes"] for row in rows] == [5, 6, 7, None]


def test_a_batch_larger_than_the_host_is_not_tried(monkeypatch):
    monkeypatch.setattr(table3, "ProcessPoolExecutor", None)
    config = PretrainConfig.model_validate({"run": {"dir": "r", "device": "cpu"}, "data": {"root": "r"}})
    rows = measure({"MoCo": config}, [2**15], "cpu", 1, 1)
    assert (rows[0]["peak_bytes"], rows[0]["step_seconds"]) == (None, None)


def out_of_memory(*args):
    raise torch.OutOfMemoryError("of a GPU")


@pytest.mark.slow
def test_a_real_measurement(monkeypatch):
    """Activations of two views instead of one, and of no key encoder: end to end takes more."""
    values = {
        "run": {"dir": "r", "device": "cpu"}, "data": {"root": "r", "image_size": 64},
        "model": {"arch": "resnet10", "bn_group_size": 32}, "moco": {"queue_size": 1024},
        "optim": {"global_batch_size": 32},
    }  # fmt: skip
    configs = {
        name: PretrainConfig.model_validate({**values, "method": method})
        for name, method in (("MoCo", "moco"), ("end to end", "simclr"))
    }
    moco, end_to_end = measure(configs, [64], "cpu", 1, 1)
    assert moco["step_seconds"] > 0
    assert end_to_end["peak_bytes"] > 1.1 * moco["peak_bytes"] > 0
    monkeypatch.setattr(table3, "_measured", out_of_memory)
    assert measure({"MoCo": configs["MoCo"]}, [32], "cpu", 1, 1)[0]["peak_bytes"] is None


def test_what_was_measured_is_kept_when_it_is_stopped(monkeypatch, tmp_path):
    calls, kept = [], tmp_path / "kept.json"
    config = PretrainConfig.model_validate({"run": {"dir": "r", "device": "cpu"}, "data": {"root": "r"}})
    configs = {"MoCo": config, "end to end": config}

    def alone(config, batch, steps, device):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return None if batch == 64 else (len(calls), 1.0)

    monkeypatch.setattr(table3, "_alone", alone)
    with pytest.raises(Preempted, match="2 of 8 measurements are kept"):
        measure(configs, [32, 64], "cpu", 1, 2, kept)
    again = measure(configs, [32, 64], "cpu", 1, 2, kept)
    assert calls == [32, 32, 64, 64, 64, 32, 32]
    assert [row["peak_bytes"] for row in again] == [6, 7, None, None]
    assert measure(configs, [32, 64], "cpu", 1, 2, kept) == again
    measure(configs, [32, 64], "cpu", 2, 1, kept)  # others
    assert calls[7:] == [32, 32, 64, 64]
    kept.write_text("{")
    measure(configs, [32], "cpu", 2, 1, kept)
    assert calls[11:] == [32, 32]
