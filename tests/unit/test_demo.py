"""`moco-dist demo`: what a person is told while it goes on."""

from moco_dist.cli import data, demo
from moco_dist.launchers import torchrun


def test_the_page_is_named_before_the_training(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(data, "main", lambda words: 0)
    monkeypatch.setattr(torchrun, "torchrun", lambda words: given.append(capsys.readouterr().out) or 69)
    assert demo.main([]) == 69
    assert "runs/demo/report/index.html appears in the first minutes" in given[0]
