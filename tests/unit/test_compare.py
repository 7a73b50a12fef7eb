"""What `compare` reads from an MLflow experiment."""

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


def test_runs_past_the_first_page_are_read_too(monkeypatch):
    """A pre-training of a few evaluations is several runs: a thousand are soon there."""
    monkeypatch.setattr(compare, "client_of", lambda uri: Client())
    records = compare.runs_of_experiment("x", "http://127.0.0.1:1")
    assert [record.name for record in records] == [f"run{i}" for i in range(7)]
