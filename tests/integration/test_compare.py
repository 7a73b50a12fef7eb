"""Runs side by side: from their folders and from MLflow, in a real browser, and the best one in the registry."""

import csv
import html
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.datasets.prepare import prepare_shapes
from moco_dist.report.compare import RunRecord, compare, write_comparison

TINY = [
    "--data.image-size", "32", "--data.num-workers", "0", "--model.arch", "resnet10", "--optim.precision", "fp32",
    "--model.head-hidden-dims", "[16]", "--model.bn-group-size", "4", "--moco.queue-size", "64",
    "--log.every-steps", "2", "--optim.global-batch-size", "8", "--optim.epochs", "1",
]  # fmt: skip
EVALUATION = ["--data.num-workers", "0"]


# mlflow's own database code uses what its version of SQLAlchemy calls deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")]


def knn_top1(run_dir):
    return json.loads((run_dir / "eval/knn_trained.json").read_text())["accuracy"]["knn_top1_k20"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in m and tau, tracked in sqlite, evaluated by kNN."""
    folder = tmp_path_factory.mktemp("compare")
    data = prepare_shapes(folder / "shapes", num_train=80, num_val=30)
    folders = []
    for name, flags in (("slow-key", ["--moco.momentum", "0.99"]), ("fast-key", ["--moco.momentum", "0.5"])):
        run_dir = folder / "runs" / name
        assert main(["pretrain", "--data.root", str(data), "--run.dir", str(run_dir), *TINY, *flags]) == 0
        assert main(["knn", "--run-dir", str(run_dir), "--neighbours", "20", *EVALUATION]) == 0
        folders.append(run_dir)
    return folders


def table(path):
    heads, *rows = csv.reader(path.read_text().splitlines())
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_folders(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    slow, fast = table(out / "compare.csv")
    assert [key for key in slow if "." in key] == ["moco.momentum"]  # what differs, and no path
    assert (slow["moco.momentum"], fast["moco.momentum"]) == ("0.99", "0.5")
    for row, run_dir in zip((slow, fast), runs, strict=True):
        log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        assert row["run"] == run_dir.name
        assert row["steps"] == "10"
        assert row["loss"] == f"{log[-1]['loss']:.4f}"
        assert row["knn_top1_k20 %"] == f"{knn_top1(run_dir):.2f}"
        seconds = sum(2 * 8 / line["images_per_second"] for line in log)
        assert row["device hours"] == f"{seconds / 3600:.3g}"
    printed = capsys.readouterr().out
    assert printed.startswith((out / "compare.md").read_text())
    assert {path.stem for path in (out / "curves").iterdir()} >= {"loss", "embedding_std"}
    Image.open(out / "curves" / "loss.png").verify()


def test_the_page_in_a_browser(runs, tmp_path):
    """The page is one file: it is moved away from its curves before it is opened."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; apt-get install chromium")
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    page = shutil.copy(tmp_path / "out" / "index.html", tmp_path / "alone.html")
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1000"]  # fmt: skip
    words = [chromium, *flags, f"--screenshot={shot}", "--dump-dom", f"file://{page}"]
    done = subprocess.run(words, check=True, capture_output=True, timeout=120)
    assert b"slow-key" in done.stdout
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = (pixels[..., 2] > pixels[..., 0] + 60).sum()  # the first run's line
    assert blue > 100, "no curve is seen"
    if keep := os.environ.get("MOCO_DIST_KEEP_SCREENSHOT"):
        shutil.copy(shot, keep)


def test_the_pages_on_a_phone(runs, tmp_path):
    """In a frame of 390 pixels nothing is wider, whatever long name or path is on the page, and legends can be read."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; apt-get install chromium")
    long_named, shapes = shutil.copytree(runs[0], tmp_path / ("long" * 30)), runs[0].parent.parent / "shapes"
    long_class = shutil.copytree(shapes / "val", tmp_path / "images" / "val") / ("class" * 30)
    next(long_class.parent.iterdir()).rename(long_class)
    features = ["--out", str(tmp_path / "f.npz"), "--page", str(tmp_path / "f.html"), "--num-workers", "0"]
    assert main(["report", str(long_named), "--data-root", str(shapes)]) == 0
    assert main(["compare", str(long_named), str(runs[1]), "--out", str(tmp_path / "out")]) == 0
    assert main(["features", str(runs[0]), str(long_class.parent), *features]) == 0
    files = (long_named / "report" / "index.html", tmp_path / "out" / "index.html", tmp_path / "f.html")
    pages = [path.read_text() for path in files]
    frames = "".join(
        f'<iframe style="width: 390px; border: 0" srcdoc="{html.escape(page)}"></iframe>' for page in pages
    )
    script = """<script>addEventListener("load", () => { document.title = [...document.querySelectorAll("iframe")].map(
        frame => [frame.contentDocument.documentElement.scrollWidth,
            ...[...frame.contentDocument.querySelectorAll(".legend li")].map(
                line => parseFloat(getComputedStyle(line).fontSize) >= 14)].join("-")).join() })</script>"""
    (tmp_path / "phone.html").write_text(f"<!doctype html><html><body>{frames}{script}</body></html>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
             f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    words = [chromium, *flags, "--dump-dom", f"file://{tmp_path / 'phone.html'}"]
    done = subprocess.run(words, check=True, capture_output=True, timeout=120)
    legend = b"-true" * 10
    assert b"<title>390%s,390,390%s</title>" % (legend, legend) in done.stdout


def test_accuracies_are_seen_without_scrolling(tmp_path):
    """In a window of 1,200 pixels, whatever differs between the runs; the browser measures it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; apt-get install chromium")
    records = [
        RunRecord(f"run{i}", {f"section.setting{n}": f"value {n} of run {i}" for n in range(12)},
                  [{"step": 5, "loss": 9.0}], {"knn_top1_k20": 40.0, "linear_top1": 50.0, "finetune_top1": 60.0}, 1, "")
        for i in range(3)
    ]  # fmt: skip
    page = write_comparison(compare(records), tmp_path)
    script = """<script>document.title = [...document.querySelectorAll("th")].filter(
        cell => cell.textContent.includes("top1")).map(
        cell => cell.getBoundingClientRect().right <= innerWidth).join()</script></body>"""
    page.write_text(page.read_text().replace("</body>", script))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,800"]  # fmt: skip
    words = [chromium, *flags, "--dump-dom", f"file://{page}"]
    done = subprocess.run(words, check=True, capture_output=True, timeout=120)
    assert b"<title>true,true,true</title>" in done.stdout


def test_an_experiment_says_the_same(runs, tmp_path):
    uri = f"sqlite:///{runs[0].parent / 'mlflow.db'}"
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "folders")]) == 0
    words = ["--experiment", "moco_dist", "--uri", uri, "--out", str(tmp_path / "mlflow")]
    assert main(["compare", *words]) == 0
    assert table(tmp_path / "mlflow" / "compare.csv") == table(tmp_path / "folders" / "compare.csv")


def test_the_best_is_registered(runs, tmp_path, capsys):
    import mlflow

    assert main(["compare", *map(str, runs), "--out", str(tmp_path), "--register", "shapes-r10"]) == 0
    assert "as version 1 of shapes-r10" in capsys.readouterr().out
    best = max(runs, key=knn_top1)
    client = mlflow.MlflowClient(f"sqlite:///{runs[0].parent / 'mlflow.db'}")
    version = client.get_model_version("shapes-r10", "1")
    assert version.run_id == json.loads((best / "mlflow.json").read_text())["run_id"]
    for part in ("## Data", "## Recipe", "MoCo v2", "## Numbers", "kNN", "## Limits", "licence"):
        assert part in version.description
    mlflow.set_tracking_uri(f"sqlite:///{runs[0].parent / 'mlflow.db'}")
    model = mlflow.pytorch.load_model("models:/shapes-r10/1")
    info = mlflow.models.get_model_info("models:/shapes-r10/1")
    assert info.signature.inputs.inputs[0].shape == (-1, 3, 32, 32)
    assert model(torch.zeros(3, 3, 32, 32)).shape == (3, 512)


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    uri = f"sqlite:///{runs[0].parent / 'mlflow.db'}"
    cases = [
        ([], "needs either folders of runs or --experiment"),
        ([str(tmp_path)], "is not the folder of a run"),
        ([str(runs[0]), str(runs[0])], "two runs are called slow-key"),
        (["--experiment", "moco-dist", "--uri", uri], "has no experiment 'moco-dist'; did you mean moco_dist?"),
    ]
    for words, expected in cases:
        assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
