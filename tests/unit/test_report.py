"""The report says what the run's folder says: numbers, pictures and settings are looked for in the page itself."""

import base64
import io
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import flatten, to_yaml
from moco_dist.errors import UserError
from moco_dist.report import charts
from moco_dist.report import page as report
from moco_dist.report.page import accuracy_table, write_report
from moco_dist.run.results import NeighbourRow


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my <run>"
    (folder / "eval").mkdir(parents=True)
    return _configure(folder)


def _configure(folder, **sections):
    values = {"run": {"dir": str(folder)}, "data": {"root": "photos"}, **sections}
    (folder / "config.yaml").write_text(to_yaml(PretrainConfig.model_validate(values)))
    return folder


def _evaluate(folder, kind, encoder, step=1000, num_train=8000, num_val=5000, curve=None, **accuracy):
    result = {"encoder": encoder, "step": step, "num_train": num_train, "num_val": num_val, "accuracy": accuracy}
    path = folder / "eval" / f"{kind}_{encoder}.json"
    path.write_text(json.dumps(result | ({"curve": curve} if curve else {})))


def _log(folder, rows):
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(step, **values):
    return {
        "step": step, "epoch": step / 100, "loss": 8.0 - step / 1000, "lr": 0.03, "contrastive_top1": 10.0,
        "contrastive_top5": 30.0, "images_per_second": 512.4, "data_wait_share": 0.01, "embedding_std": 0.9,
        "eta_seconds": 5.0, **values,
    }  # fmt: skip


class _Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children, self.own_text = tag, attributes, parent, [], ""

    def all(self, tag, **attributes):
        found = [c for c in self.children if c.tag == tag and attributes.items() <= c.attributes.items()]
        return found + [e for c in self.children for e in c.all(tag, **attributes)]

    @property
    def text(self):
        return " ".join((self.own_text + " ".join(c.text for c in self.children)).split())


class _Page(HTMLParser):
    """The page as a tree; a tag closed out of turn is an error."""

    EMPTY = ("meta", "img")

    def __init__(self, path):
        super().__init__()
        self.root = self.current = _Element("root", {}, None)
        self.feed(path.read_text(encoding="utf-8"))
        assert self.current is self.root, f"{self.current.tag} is never closed"

    def handle_starttag(self, tag, attrs):
        element = _Element(tag, dict(attrs), self.current)
        self.current.children.append(element)
        if tag not in self.EMPTY:
            self.current = element

    def handle_endtag(self, tag):
        assert tag == self.current.tag
        self.current = self.current.parent

    def handle_data(self, data):
        self.current.own_text += data

    def section(self, name):
        (found,) = self.root.all("section", id=name)
        return found


def _pixels(image):
    prefix, _, data = image.attributes["src"].partition(",")
    assert prefix == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_accuracy_table(run_dir):
    for encoder, knn in (("pixels", 41.25), ("untrained", 38.5), ("trained", 60.111)):
        _evaluate(run_dir, "knn", encoder, knn_top1_k10=1.0, knn_top1_k20=knn, knn_top1_k200=2.0)
    _evaluate(run_dir, "linear", "trained", linear_top1=70.0, linear_top5=90.0)
    assert accuracy_table(run_dir).splitlines() == [
        "                         kNN top-1 %, k = 20  linear top-1 %",
        "raw pixels                             41.25               –",
        "untrained                              38.50               –",
        "pre-trained                            60.11           70.00",
        "------------------------------------------------------------",
        "pre-trained − untrained               +21.61               –",
        "kNN: 8,000 training and 5,000 test images",
        "linear: 8,000 training and 5,000 test images",
        "pre-trained: step 1,000",
        "–: not evaluated (moco-dist knn, moco-dist linear)",
    ]


def test_accuracy_table_of_a_run_that_was_not_evaluated(run_dir):
    lines = accuracy_table(run_dir).splitlines()
    assert [line.split()[-2:] for line in lines[1:4]] == [["–", "–"]] * 3


def test_accuracy_table_compares_one_k(run_dir):
    _evaluate(run_dir, "knn", "trained", knn_top1_k200=3.0, knn_top1_k5=50.0)
    _evaluate(run_dir, "knn", "untrained", knn_top1_k200=2.0)
    table = accuracy_table(run_dir)
    assert "k = 5 " in table
    assert "50.00" in table
    assert "+" not in table  # the untrained encoder has no k = 5: nothing to subtract


def test_a_loss_of_accuracy_is_shown_as_one(run_dir):
    _evaluate(run_dir, "linear", "trained", linear_top1=40.0)
    _evaluate(run_dir, "linear", "untrained", linear_top1=44.5)
    assert "-4.50" in accuracy_table(run_dir)


def test_what_spoils_the_comparison_is_said(run_dir):
    _evaluate(run_dir, "knn", "trained", num_val=100, knn_top1_k20=50.0)
    _evaluate(run_dir, "knn", "untrained", knn_top1_k20=40.0)
    _evaluate(run_dir, "linear", "trained", step=500, linear_top1=40.0)
    table = accuracy_table(run_dir)
    assert "the rows differ and cannot be compared" in table
    assert "pre-trained: kNN at step 1,000, linear at step 500" in table


def test_an_imported_backbone_is_called_so(run_dir):
    _evaluate(run_dir, "knn", "trained", step=0, knn_top1_k20=50.0)
    assert "pre-trained: step 0" in accuracy_table(run_dir)
    metadata = {"imported_from": "moco_v2.pth.tar"}
    safetensors.torch.save_file({"x": torch.zeros(1)}, run_dir / "backbone.safetensors", metadata)
    assert "pre-trained: imported from moco_v2.pth.tar" in accuracy_table(run_dir)


def test_the_page_needs_nothing_else(run_dir):
    _log(run_dir, [_row(50), _row(100)])
    path = write_report(run_dir, torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8))
    assert path == run_dir / "report" / "index.html"
    page = _Page(path)
    for element in page.root.all("img"):
        assert _pixels(element).size
        assert element.attributes["alt"]
    assert not page.root.all("script")
    assert not page.root.all("link")
    assert "url(" not in page.root.all("style")[0].own_text
    assert page.root.all("h1")[0].text == "my <run>"


def test_the_page_has_the_accuracies_of_the_table(run_dir):
    _evaluate(run_dir, "knn", "trained", knn_top1_k20=60.0)
    _evaluate(run_dir, "knn", "untrained", knn_top1_k20=38.5)
    rows = _Page(write_report(run_dir)).section("accuracy").all("tr")
    assert [[cell.text for cell in row.children] for row in rows[1:]] == [
        ["raw pixels", "–", "–"],
        ["untrained", "38.50", "–"],
        ["pre-trained", "60.00", "–"],
        ["pre-trained − untrained", "+21.50", "–"],
    ]


def test_curves_are_those_that_were_logged(run_dir):
    accuracies = {"step": 50, "knn_top1": 30.0, "probe_top1": 41.5}
    _log(run_dir, [_row(50), accuracies, _row(100, loss=float("nan")), _row(150, loss=6.25)])
    _evaluate(run_dir, "linear", "trained", linear_top1=9, curve=[{"epoch": 1, "loss": 2.0, "top1": 55.5}])
    page = _Page(write_report(run_dir))
    alts = [image.attributes["alt"] for image in page.section("curves").all("img")]
    assert alts == [
        "loss (InfoNCE): at the end loss 6.25",
        "learning rate: at the end lr 0.03",
        "contrastive accuracy, %: at the end top-1 10, top-5 30",
        "top-1 during training, %: at the end kNN 30, linear probe 41.5",
        "spread of the embeddings: at the end std 0.9",
        "images per second: at the end images/s 512.4",
        "linear evaluation: top-1, %: at the end pre-trained 55.5",
    ]
    assert "step 150 (epoch 1.5), 512 images/s" in page.root.text


def test_a_log_that_was_cut_short_and_resumed(run_dir):
    whole = "".join(json.dumps(row) + "\n" for row in (_row(50), _row(100, loss=9.0), _row(150, loss=9.0)))
    (run_dir / "log.jsonl").write_text(whole + '{"step": 200, "lo\n' + json.dumps(_row(100, loss=5.5)) + "\n")
    rows = report.read_log(run_dir)
    assert [(row["step"], row["loss"]) for row in rows] == [(50, 7.95), (100, 5.5), (150, 9.0)]


@pytest.mark.parametrize(("left", "reloads"), [(5.0, True), (0.0, False)])
def test_the_page_of_a_run_that_goes_on_loads_itself_again(run_dir, left, reloads):
    _log(run_dir, [_row(50), _row(100, eta_seconds=left), {"step": 100, "knn_top1": 30.0}])
    page = _Page(write_report(run_dir))
    assert len(page.root.all("meta", **{"http-equiv": "refresh"})) == reloads
    assert len(page.root.all("p", id="goes-on")) == reloads


def test_the_page_of_an_imported_backbone_does_not_load_itself_again(run_dir):
    assert _Page(write_report(run_dir)).root.all("p", id="goes-on")
    safetensors.torch.save_file({"x": torch.zeros(1)}, run_dir / "backbone.safetensors", {"imported_from": "x.pth"})
    assert not _Page(write_report(run_dir)).root.all("p", id="goes-on")


def test_a_legend_covers_no_curve(monkeypatch):
    """Its box lies above the axes, whatever the names and the number of curves."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: drawn.append(figure))
    for names in (["a", "b"], [f"run {i} of a long name " * 4 for i in range(8)]):
        charts.chart("loss", "step", 10, {name: ([0, 10], [i, 9]) for i, name in enumerate(names)}, (9.5, "chance"))
        figure = drawn[-1]
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, axes = legend.get_window_extent(), figure.axes[0].get_window_extent()
        assert box.y0 >= axes.y1
        assert box.x1 <= figure.bbox.x1
        assert axes.height > 0.55 * 2.5 * figure.dpi  # the curves keep their room


def test_the_loss_is_drawn_with_its_chance_level(run_dir, monkeypatch):
    """Chance is ln(K + 1): one positive among K negatives, all alike."""
    _configure(run_dir, moco={"queue_size": 1023}, optim={"global_batch_size": 32})
    _log(run_dir, [_row(50)])
    references = {}

    def chart(title, x_label, last_x, series, reference):
        references[title] = reference
        return report.Picture(None, title)

    monkeypatch.setattr(report, "chart", chart)
    write_report(run_dir)
    level, label = references["loss (InfoNCE)"]
    assert level == pytest.approx(math.log(1024))
    assert "6.93" in label


def test_a_run_without_a_log(run_dir):
    page = _Page(write_report(run_dir))
    assert "Nothing was logged yet" in page.section("curves").text
    assert not page.root.all("section", id="views")
    assert not page.root.all("section", id="neighbours")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_view_pairs(run_dir, dtype):
    pairs = torch.randint(0, 256, (3, 2, 3, 10, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = pairs if dtype == torch.uint8 else pairs.to(dtype) / 255
    images = _Page(write_report(run_dir, given)).section("views").all("img")
    shown = np.stack([_pixels(image) for image in images]).reshape(3, 2, 10, 10, 3)
    assert (shown == pairs.permute(0, 1, 3, 4, 2).numpy()).all()
    assert images[1].attributes["alt"] == "key view of sample 1"


def test_float_views_beyond_the_range_of_colours_are_clipped(run_dir):
    pairs = torch.tensor([-0.5, 1.5]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)
    dark, bright = _Page(write_report(run_dir, pairs)).section("views").all("img")
    assert (_pixels(dark) == 0).all()
    assert (_pixels(bright) == 255).all()


def test_neighbours_are_marked_right_or_wrong(run_dir, tmp_path):
    for name, colour, size in (("cat", (255, 0, 0), (500, 250)), ("dog", (0, 0, 255), (20, 20))):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    row = NeighbourRow(
        tmp_path / "cat.png", "cat", (tmp_path / "cat.png", tmp_path / "dog.png", tmp_path / "broken.png"),
        ("cat", "dog", "cat"),
    )  # fmt: skip
    query, right, wrong, gone = _Page(write_report(run_dir, None, [row])).section("neighbours").all("figure")
    assert query.text == "cat"
    assert [f.attributes["class"] for f in (right, wrong, gone)] == ["right", "wrong", "right"]
    assert right.text == "✓ cat"
    assert wrong.text == "✗ dog"
    assert _pixels(wrong.all("img")[0])[0, 0].tolist() == [0, 0, 255]
    assert _pixels(right.all("img")[0]).shape == (64, 128, 3)  # thumbnails, or the page would be huge
    assert not gone.all("img")
    assert "file not found" in gone.text


def test_settings_that_differ_come_first(run_dir):
    _configure(
        run_dir, model={"arch": "resnet18"}, moco={"momentum": 0.99}, tracking={"uri": "http://someone:hunter2@host"}
    )
    page = _Page(write_report(run_dir))
    changed, everything = page.section("settings").all("table")
    cells = [[cell.text for cell in row.children] for row in changed.all("tr")[1:]]
    assert cells == [
        ["model.arch", "resnet18", "resnet50"],
        ["moco.momentum", "0.99", "0.999"],
        ["tracking.uri", "http://host", "null"],
    ]
    shown = [row.children[0].text for row in everything.all("tr")[1:]]
    config = PretrainConfig.model_validate({"run": {"dir": "x"}, "data": {"root": "y"}})
    assert shown == list(flatten(config))
    assert page.section("settings").all("details")[0].all("table") == [everything]


def test_versions_are_named(run_dir):
    page = _Page(write_report(run_dir))
    assert f"torch {torch.__version__.split('+')[0]}" in page.root.all("p", id="versions")[0].text


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run: it has no config.yaml"):
        write_report(tmp_path)
