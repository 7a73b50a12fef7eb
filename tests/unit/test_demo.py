"""`moco-dist demo`: what a person is shown while it goes on."""

import json

from moco_dist.cli import data, demo
from moco_dist.launchers import torchrun
from moco_dist.run.folder import RunFolder

EVALUATED = {"knn_top1_k20": 30.25}


def test_a_table_and_a_page_are_there_before_the_training(tmp_path, monkeypatch, capsys):
    """Of what needs none, and with the command that opens the page."""
    monkeypatch.chdir(tmp_path)
    run, commands = RunFolder(demo.RUN), []

    def ranks(words):
        commands.append(words[5:])
        if "knn" not in words:
            return 69
        assert run.config.exists()
        result = {"step": 0, "num_train": 80, "num_val": 20, "accuracy": EVALUATED}
        run.result("knn", "untrained").parent.mkdir(parents=True)
        run.result("knn", "untrained").write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(data, "main", lambda words: 0)
    monkeypatch.setattr(torchrun, "torchrun", ranks)
    assert demo.main([]) == 69
    assert [words[0] for words in commands] == ["knn", "pretrain"]
    assert commands[0][-4:] == ["--data.image-size", "48", "--encoders", "[pixels, untrained]"]  # of demo_linear.yaml
    out = capsys.readouterr().out
    assert "30.25" in out
    assert f"python -m webbrowser {run.report.resolve().as_uri()}" in out
    page = run.report.read_text()
    assert "30.25" in page
    assert 'http-equiv="refresh"' in page
