"""RankMe during training, of images that nothing else can be measured of."""

import shutil

from moco_dist.cli.main import main
from moco_dist.run.logbook import read_log
from tests.faults.processes import TINY


def test_rankme_needs_no_labels(tiny_data, tmp_path, capsys):
    """Of images that lie in no class folders, beside which there is no validation set."""
    images = tmp_path / "images" / "train"
    images.mkdir(parents=True)
    for number, path in enumerate(sorted((tiny_data / "train").rglob("*.jpg"))):
        shutil.copy(path, images / f"{number}.jpg")
    words = [
        "pretrain",
        "--data.root",
        str(images.parent),
        "--run.dir",
        str(tmp_path / "run"),
        *TINY,
        "--optim.epochs",
        "1",
    ]
    assert main([*words, "--log.knn-every-epochs", "1"]) == 0
    assert "the images have no classes, so" in capsys.readouterr().out
    (row,) = (row for row in read_log(tmp_path / "run") if "rankme" in row)
    assert 1 < row["rankme"] < 80 and "knn_top1" not in row and "probe_top1" not in row
    main(["doctor", str(tmp_path / "run" / "config.yaml")])
    told = capsys.readouterr().out
    assert "80 images in" in told and "validation" not in told
