"""What `moco-dist export` writes for timm and transformers, and as ONNX: loaded there, it gives the same features."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import moco_dist
from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.run.model_card import model_card
from tests.small_run import make_run

timm = pytest.importorskip("timm", reason="timm is not installed")
# In float64: float32 convolutions round differently by memory format.
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture(scope="module", params=["resnet18", "resnet10", "torchvision:resnet34"])
def run(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("export") / "run"
    return run_dir, make_run(run_dir, arch=request.param).backbone.double()


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("folder") / "mine"
    assert main(["export", str(run[0]), "--format", "huggingface", "--out", str(out)]) == 0
    return out


def close(found, expected):
    assert len(expected) == 1 or expected.std(0).mean() > 0.01  # no constant
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_timm_loads_the_folder(run, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).double().eval()
    close(model(IMAGES), run[1](IMAGES))
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10).double().eval()
    close(classifier.forward_head(classifier.forward_features(IMAGES), pre_logits=True), run[1](IMAGES))


def test_timm_makes_the_evaluations_crop(run, folder, tmp_path):
    """To a level or two of 255: it resizes with PIL."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    backbone = moco_dist.load_backbone(run[0], device="cpu")
    ours = backbone._opened.encoder.normalised(backbone.transform(image)[None])[0]
    assert (transform(image) - ours).abs().max() < 2.5 / 255 / 0.22


@pytest.mark.slow
@torch.no_grad()
def test_transformers_loads_the_folder(run, folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, told = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    close(model.double().eval()(IMAGES).pooler_output, run[1](IMAGES))


@pytest.mark.slow
@torch.no_grad()
def test_onnx_takes_any_batch(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    backbone = make_run(tmp_path / "run", arch="resnet10").backbone
    out = tmp_path / "mine.onnx"
    assert main(["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(out)]) == 0
    names = {"onnxruntime": onnxruntime}
    how = capsys.readouterr().out.splitlines()[-1].strip()
    images = torch.randn(5, 3, 224, 224, generator=torch.Generator().manual_seed(6))
    for count in (1, 5):
        found = eval(how, {**names, "images": images[:count].numpy()})[0]
        close(torch.from_numpy(found), backbone(images[:count]))
    facts = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(facts["moco_dist"])["step"] == "7"


def test_the_card_says_what_is_known(run, folder):
    (run[0] / "eval").mkdir(exist_ok=True)
    result = {"encoder": "trained", "variant": "", "step": 7, "num_train": 80, "num_val": 20}
    (run[0] / "eval" / "knn_trained.json").write_text(json.dumps({**result, "accuracy": {"knn_top1_k20": 12.5}}))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    for part in ("MoCo v2 (arXiv 2003.04297): K 256", "`unused`", "7 steps", "not evaluated", "local-dir:mine",
                 "an image's short side to\n256 pixels", f"moco_dist {moco_dist.__version__}"):  # fmt: skip
        assert part in card, part
    assert str(run[0].parent) not in card
    config = PretrainConfig.model_validate({"run": {"dir": "r"}, "data": {"root": "s3://bucket/set"}})
    later = model_card(run[0], config, 7)
    assert "- kNN, after 7 steps: knn_top1_k20 12.50 % of 20 images" in later
    assert "`set`" in later and "bucket" not in later


def test_an_imported_backbone_s_card_claims_nothing(tmp_path, capsys):
    import torchvision

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    words = ["import", str(tmp_path / "theirs.pth"), "--arch", "resnet18", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    result = {"encoder": "trained", "variant": "", "step": 0, "num_val": 20, "accuracy": {"knn_top1_k20": 12.5}}
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "knn_trained.json").write_text(json.dumps(result))
    assert main(["export", str(tmp_path / "run"), "--format", "huggingface", "--out", str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "from a file, `theirs.pth`, of another program" in card
    assert "MoCo" not in card and "epochs" not in card
    assert "- kNN, as imported: knn_top1_k20 12.50 % of 20 images" in card
    capsys.readouterr()
    assert main(["doctor", "--run", str(tmp_path / "run")]) == 0
    assert "imported from theirs.pth, so there is no training to look at" in capsys.readouterr().out


def test_mistakes_are_one_line(run, folder, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "small", arch="resnet10", stem="cifar")
    cases = [
        (run[0], "huggingface", folder, "is there already; huggingface is a folder, new or empty"),
        (run[0], "hugingface", tmp_path / "new", "did you mean huggingface?"),
        (run[0], "onnx", tmp_path / "new.pth", "ends in .onnx"),
        (run[0], "onnx", tmp_path / "new.onnx", "pip install 'moco_dist[export]'"),
        (tmp_path / "small", "huggingface", tmp_path / "new", "huggingface has no resnet10 with the cifar stem"),
    ]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for run_dir, format, out, expected in cases:
        assert main(["export", str(run_dir), "--format", format, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists()


def test_a_network_that_no_exporter_takes_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    make_run(tmp_path / "run", arch="resnet10")

    def refuse(*args, **more):
        raise RuntimeError("no operator for it\nmany lines more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    assert main(["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(tmp_path / "a.onnx")]) == 2
    assert "torch's exporter does not take resnet10: no operator for it\n" in capsys.readouterr().err
