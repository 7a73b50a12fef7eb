"""What `compare` reads from an MLflow experiment."""

import re
from types import SimpleNamespace

from moco_dist.report import compare

PAGE = 3


class Page(list):
    """A part of the runs, as MLflow's client gives them."""

    token = None


class Client:
    """An experiment of seven pre-trainings, by pages of three."""

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="1", name=name)

    def search_runs(self, experiment_ids, order_by, max_results, page_token):
        start = int(page_token or 0)
        page = Page(
            SimpleNamespace(info=SimpleNamespace(run_id=str(i), run_name=f"run{i}"),
                            data=SimpleNamespace(tags={}, metrics={}, params={"run.seed": str(i)}))
            for i in range(start, min(start + PAGE, 7))
        )  # fmt: skip
        page.token = str(start + PAGE) if start + PAGE < 7 else None
        return page

    def get_metric_history(self, run_id, key):
        return []


def record(number, **accuracy):
    log = [{"step": 5, "loss": 9.0 - number / 10}]
    settings = {"run.seed": str(number), "data.root": "x" * 200, "moco.momentum": str(number)}
    return compare.RunRecord(f"run{number}", settings, log, accuracy, 1, "")


def test_any_number_of_runs_is_shown_and_the_best_eight_are_drawn(tmp_path):
    found = compare.compare([record(i, linear_top1=float(i % 7)) for i in range(12)])
    assert [row[0] for row in found.rows] == [f"run{i}" for i in range(12)]
    assert found.heads[:4] == ["run", "linear_top1 %", "loss", "steps"]  # what counts, before what differs
    assert found.note == "Curves are of the 8 runs that are best by linear_top1."
    drawn = re.findall(r"run\d+", found.curves[0].alt)
    assert drawn == ["run2", "run3", "run4", "run5", "run6", "run9", "run10", "run11"]
    assert found.note in compare.write_comparison(found, tmp_path).read_text()
    by_loss = compare.compare([record(i) for i in range(9)])
    assert "run0" not in re.findall(r"run\d+", by_loss.curves[0].alt)  # the highest loss
    assert compare.compare([record(0)]).note == ""


def test_runs_past_the_first_page_are_read_too(monkeypatch):
    """A pre-training of a few evaluations is several runs: a thousand are soon there."""
    monkeypatch.setattr(compare, "client_of", lambda uri: Client())
    records = compare.runs_of_experiment("x", "http://127.0.0.1:1")
    assert [record.name for record in records] == [f"run{i}" for i in range(7)]
