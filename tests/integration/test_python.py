"""The Python door: the page's examples as written, and what is public."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import moco_dist
from moco_dist.cli.main import main
from moco_dist.datasets.prepare import prepare_shapes
from moco_dist.report.map import map_of_run

PAGE = Path("docs/python.md")


def test_what_is_public_is_said_once_and_takes_no_torch():
    code = """if True:
        import sys, moco_dist
        assert not {"torch", "mlflow", "pydantic"} & set(sys.modules)
        assert set(moco_dist.__all__) <= set(dir(moco_dist))
        assert all(getattr(moco_dist, name) is not None for name in moco_dist.__all__)
        from moco_dist import api
        assert sorted(["__version__", *api.__all__]) == sorted(moco_dist.__all__)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'train_it'"):
        moco_dist.train_it  # noqa: B018


@pytest.mark.slow
def test_the_page_s_examples(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    prepare_shapes(tmp_path / "data" / "shapes", num_train=1_024, num_val=20)  # as many as the demo's queue has keys
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    exec(blocks[0], names)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capsys.readouterr().out.endswith("0.1 runs/python/checkpoints/step_00000004\n")
    evaluation = ["--neighbours", "5", "--data.num-workers", "0", "--tracking", "none"]
    assert main(["knn", "--run-dir", "runs/python", *evaluation]) == 0
    assert map_of_run(Path("runs/python")).alt.endswith(": 20 images")
    for block in blocks[1:]:
        exec(block, names)
    assert sorted(names["losses"]) == [2, 4]
    assert set(names["accuracies"]) == {"knn_trained"}
    found, backbone = names["found"], names["backbone"]
    assert (backbone.step, backbone.dim, found.values.shape) == (4, 512, (20, 512))
    assert found.classes[found.labels[0]] == found.paths[0].partition("/")[0]

    # A file's crop, a picture's crop and a folder's are the same, and so are their features.
    file = tmp_path / "data" / "shapes" / "val" / found.paths[3]
    with Image.open(file) as picture:
        assert torch.equal(backbone.transform(picture), backbone.transform(file))
    torch.testing.assert_close(backbone(backbone.transform(file)[None]).cpu()[0], found.values[3], rtol=1e-4, atol=1e-5)


def test_mistakes_are_lines(tmp_path):
    with pytest.raises(moco_dist.UserError, match=r"optim\.epohcs; did you mean|unknown flag --optim\.epohcs"):
        moco_dist.pretrain_config("demo", optim={"epohcs": 3})
    with pytest.raises(moco_dist.UserError, match=r"augment\.jitter: \[FLOAT, FLOAT, FLOAT, FLOAT\] is expected"):
        moco_dist.pretrain_config("demo", augment={"jitter": [0.4, 0.4]})
    config = moco_dist.pretrain_config("demo", method="moco", optim={"base_lr": 1e-30}, moco={"symmetric": True})
    assert (config.optim.base_lr, config.moco.symmetric, config.optim.epochs) == (1e-30, True, 10)
    for read in (moco_dist.read_log, moco_dist.read_results, moco_dist.load_backbone):
        with pytest.raises(moco_dist.UserError, match="is not the folder of a run"):
            read(tmp_path)
