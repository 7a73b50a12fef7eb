"""Exported weights load in the real torchvision and timm and give the same features; others' files come in."""

import argparse
import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from moco_dist.cli.main import main
from moco_dist.datasets.prepare import prepare_shapes
from moco_dist.errors import UserError
from moco_dist.method.encoder import build_encoder
from moco_dist.run.export import to_detectron2
from moco_dist.run.weights import import_backbone, load_trained, read_backbone
from tests.small_run import config_of, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("weights") / "run"
    return run_dir, make_run(run_dir)


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def same_features(a, b):
    """To 1e-6, in float64: float32 convolutions round differently by memory format."""
    a, b = (copy.deepcopy(model).double().eval() for model in (a, b))
    assert a(IMAGES).std(0).mean() > 0.01  # no constant
    torch.testing.assert_close(a(IMAGES), b(IMAGES), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_torchvision_loads_it_strictly(run, tmp_path, capsys):
    run_dir, encoder = run
    assert main(["export", str(run_dir), "--format", "torchvision", "--out", str(tmp_path / "w.pth")]) == 0
    assert "strict=True" in capsys.readouterr().out
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=True)
    same_features(model, encoder.backbone)


@torch.no_grad()
def test_timm_loads_it_strictly(run, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    run_dir, encoder = run
    assert main(["export", str(run_dir), "--format", "timm", "--out", str(tmp_path / "w.safetensors")]) == 0
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "w.safetensors"))
    same_features(model, encoder.backbone)


def test_detectron2_has_its_names(run, tmp_path):
    run_dir, encoder = run
    assert main(["export", str(run_dir), "--format", "detectron2", "--out", str(tmp_path / "w.pth")]) == 0
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert content["matching_heuristics"] is True
    assert torch.equal(content["model"]["stem.conv1.weight"], encoder.backbone.conv1.weight)
    assert torch.equal(content["model"]["res3.0.shortcut.norm.running_var"],
                       encoder.backbone.layer2[0].downsample[1].running_var)  # fmt: skip
    assert torch.equal(content["model"]["res5.1.conv2.norm.bias"], encoder.backbone.layer4[1].bn2.bias)
    assert not any("fc" in name or "layer" in name or "bn" in name for name in content["model"])


def test_every_name_of_a_resnet50_becomes_detectron2s():
    """ResNet-50's tensors as detectron2's model zoo lists them: stem and 16 blocks of three convolutions."""
    names = {to_detectron2(name) for name in torchvision.models.resnet50().state_dict() if "num_batches" not in name}
    expected = {"stem.fc.weight", "stem.fc.bias"}  # no part of an exported backbone
    norm = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    convs = ["stem.conv1"]
    for stage, blocks in enumerate((3, 4, 6, 3), 2):
        convs += [f"res{stage}.{block}.conv{i}" for block in range(blocks) for i in (1, 2, 3)]
        convs.append(f"res{stage}.0.shortcut")
    expected |= {f"{conv}.{part}" for conv in convs for part in ("weight", *norm)}
    assert names == expected


@torch.no_grad()
def test_the_whole_encoder(run, tmp_path):
    run_dir, encoder = run
    out = tmp_path / "w.safetensors"
    assert main(["export", str(run_dir), "--format", "safetensors", "--out", str(out)]) == 0
    again = build_encoder(config_of(run_dir).model, 9)
    again.load_state_dict(safetensors.torch.load_file(out), strict=True)
    same_features(again, encoder)


def lightly_names(backbone):
    return nn.Sequential(*list(backbone.children())[:-1]).state_dict()


NAMINGS = {
    "the original release": lambda b: (
        {f"module.encoder_q.{k}": v for k, v in b.state_dict().items()}
        | {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in b.state_dict().items()}
    ),
    "lightly": lambda b: {f"backbone.{k}": v for k, v in lightly_names(b).items()},
    "mmselfsup": lambda b: {f"backbone.{k}": v for k, v in b.state_dict().items()} | {"neck.fc.weight": torch.ones(2)},
    "OpenSelfSup": lambda b: {f"encoder_q.0.{k}": v for k, v in b.state_dict().items()},
    "torchvision": lambda b: b.state_dict(),
    "a compiled module under DDP": lambda b: {f"module._orig_mod.{k}": v for k, v in b.state_dict().items()},
    "a compiled backbone": lambda b: {f"backbone._orig_mod.{k}": v for k, v in b.state_dict().items()},
}


@pytest.mark.parametrize("naming", NAMINGS)
@torch.no_grad()
def test_other_programs_files_come_in(naming, tmp_path):
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18()
    path = tmp_path / "theirs.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": NAMINGS[naming](theirs)}, path)
    words = ["import", str(path), "--arch", "resnet18", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(words) == 0
    encoder = build_encoder(config_of(tmp_path).model, 3)
    assert load_trained(encoder, tmp_path / "run") == 0
    theirs.fc = nn.Identity()
    same_features(encoder.backbone, theirs)


def test_an_imported_backbone_is_evaluated(tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    data = prepare_shapes(tmp_path / "shapes", num_train=20, num_val=10)
    words = [str(tmp_path / "theirs.pth"), "--arch", "resnet18", "--data-root", str(data)]
    assert main(["import", *words, "--out", str(tmp_path / "run")]) == 0
    flags = ["--neighbours", "1", "--data.image-size", "32", "--data.num-workers", "0", "--tracking", "none"]
    assert main(["knn", "--run-dir", str(tmp_path / "run"), *flags]) == 0
    assert "trained: knn_top1_k1" in capsys.readouterr().out


def test_what_was_exported_comes_in_again(run, tmp_path):
    run_dir, encoder = run
    for format, name in (("torchvision", "a.pth"), ("timm", "b.safetensors"), ("safetensors", "c.safetensors")):
        assert main(["export", str(run_dir), "--format", format, "--out", str(tmp_path / name)]) == 0
        found = read_backbone(tmp_path / name, "resnet18").tensors
        assert all(torch.equal(found[name], value) for name, value in encoder.backbone.state_dict().items()
                   if "num_batches" not in name), format  # fmt: skip


def squeeze_and_excite(net):
    net.layer2[0].se = nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 128))


def not_a_number(net):
    net.layer2[0].conv2.weight.data[3, 2, 1, 0] = float("nan")


def sparse(net):
    net.conv1.weight = nn.Parameter(net.conv1.weight.detach().to_sparse())


def without_values(net):
    net.conv1.to("meta")


def one_channel(net):
    net.conv1 = nn.Conv2d(1, 64, 7, bias=False)


def one_small_channel(net):
    net.conv1 = nn.Conv2d(1, 64, 3, bias=False)


def small_stem(net):
    net.conv1 = nn.Conv2d(3, 64, 3, bias=False)


NOT_WHAT_WAS_ASKED_FOR = [
    # what the file has, what is done to it, --arch, what is said
    ("resnet34", None, "resnet18", "layer1.2.conv1.weight has no place in it; with --arch resnet34 it fits"),
    ("resnet101", None, "resnet50", "layer3.6.conv1.weight has no place in it; no --arch of resnet10, resnet18"),
    ("resnet18", None, "resnet34", "layer1.2.conv1.weight is missing; with --arch resnet18 it fits"),
    ("resnext50_32x4d", None, "resnet50", "has the shape (128, 64, 1, 1) instead of (64, 64, 1, 1); no --arch of"),
    ("resnet18", squeeze_and_excite, "resnet18", "layer2.0.se.0.weight has no place in it; no --arch of"),
    ("resnet18", not_a_number, "resnet18", "layer2.0.conv2.weight has values that are not finite numbers"),
    ("resnet18", sparse, "resnet18", "conv1.weight is sparse, quantised or without values; save plain tensors"),
    ("resnet18", without_values, "resnet18", "conv1.weight is sparse, quantised or without values"),
    ("resnet18", one_channel, "resnet18", '(64, 1, 7, 7) instead of (64, 3, 7, 7); images here have 3 channels; state["'
                                          'conv1.weight"].repeat(1, 3, 1, 1) / 3 in its place computes the same'),
    ("resnet18", one_small_channel, "resnet18", "computes the same on gray ones; then with --stem cifar it fits"),
    ("resnet18", small_stem, "resnet18", "(64, 3, 3, 3) instead of (64, 3, 7, 7); with --stem cifar it fits"),
    ("resnet34", small_stem, "resnet18", "with --arch resnet34 --stem cifar it fits"),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "change", "arch", "says"), NOT_WHAT_WAS_ASKED_FOR)
def test_another_network_is_not_taken_for_the_one_asked_for(theirs, change, arch, says, tmp_path):
    with torch.device("meta"):  # a random start of a large network takes seconds
        net = getattr(torchvision.models, theirs)()
    net.to_empty(device="cpu").load_state_dict({k: torch.zeros_like(v) for k, v in net.state_dict().items()})
    if change is not None:
        change(net)
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(UserError) as error:
        read_backbone(tmp_path / "theirs.pth", arch)
    assert says in str(error.value)


@torch.no_grad()
def test_the_advice_can_be_followed(tmp_path):
    """A network for gray images comes in with the three channels that are advised, one for small images by its flag."""
    torch.manual_seed(2)
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()
    one_channel(net)
    state = net.state_dict()
    torch.save({**state, "conv1.weight": state["conv1.weight"].repeat(1, 3, 1, 1) / 3}, tmp_path / "gray.pth")
    ours = torchvision.models.resnet18()
    ours.fc = nn.Identity()
    ours.conv1 = nn.Conv2d(3, 64, 7, bias=False)
    ours.load_state_dict(read_backbone(tmp_path / "gray.pth", "resnet18").tensors)
    gray = IMAGES[:, :1]
    torch.testing.assert_close(ours.double().eval()(gray.expand(-1, 3, -1, -1)), net.double().eval()(gray))

    small = build_encoder(config_of(tmp_path, stem="cifar").model, 0)
    torch.save(small.backbone.state_dict(), tmp_path / "small.pth")
    words = [str(tmp_path / "small.pth"), "--arch", "resnet18", "--stem", "cifar", "--out", str(tmp_path / "run")]
    assert main(["import", *words]) == 0
    again = build_encoder(config_of(tmp_path, stem="cifar").model, 1)
    load_trained(again, tmp_path / "run")
    same_features(again.backbone, small.backbone)


def test_settings_that_were_changed_after_an_import_are_noticed(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    import_backbone(tmp_path / "theirs.pth", "resnet18", tmp_path, tmp_path / "run")
    with pytest.raises(UserError, match="does not fit the model of .*config.yaml: layer|backbone.layer"):
        load_trained(build_encoder(config_of(tmp_path, "resnet50").model, 0), tmp_path / "run")


@pytest.mark.parametrize(("value", "named"), [
    (argparse.Namespace(lr=1), "argparse.Namespace"), (Path("data"), "pathlib"), (nn.Linear(1, 1), "Linear"),
])  # fmt: skip
def test_the_object_in_the_way_is_named(value, named, tmp_path):
    """Hyperparameters beside the weights, or the module itself, as programs leave them in their checkpoints."""
    torch.save({"hyper_parameters": value, "state_dict": {}}, tmp_path / "theirs.ckpt")
    with pytest.raises(UserError, match=f"it holds .*{named}.*, which is no tensor; .*save its state dict") as error:
        read_backbone(tmp_path / "theirs.ckpt", "resnet18")
    assert str(error.value).isprintable()


def test_tensors_that_lie_elsewhere_are_looked_for_by_a_person(tmp_path):
    torch.save({"student": {"conv1.weight": torch.ones(1)}, "epoch": 3}, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="no tensors, .* under state_dict, .*; it holds student, epoch; save"):
        read_backbone(tmp_path / "theirs.pth", "resnet18")


class Hostile:
    """Runs code when a careless program loads it."""

    def __reduce__(self):
        return (print, ("code of the file was run",))


def test_mistakes_are_one_line(run, tmp_path, capsys):
    run_dir, _ = run
    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pth")
    torch.save({"state_dict": torchvision.models.resnet18().state_dict()}, tmp_path / "r18.pth")
    (tmp_path / "text.pth").write_text("no weights")
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    out, new = str(tmp_path / "out.pth"), str(tmp_path / "new")
    make_run(tmp_path / "small", arch="resnet10", stem="cifar")
    cases = [
        (["export", str(run_dir), "--format", "torchvison", "--out", out], "did you mean torchvision?"),
        (["export", str(run_dir), "--format", "timm", "--out", out], "ends in .safetensors"),
        (["export", str(tmp_path), "--format", "torchvision", "--out", out], "is not the folder of a run"),
        (["export", str(tmp_path / "small"), "--format", "torchvision", "--out", out], "no resnet10 with the cifar"),
        (["import", str(tmp_path / "none.pth"), "--out", new], "is not a file"),
        (["import", str(tmp_path / "hostile.pth"), "--out", new], "without running code of it: it holds print, which"),
        (["import", str(tmp_path / "text.pth"), "--out", new], "cannot be read as weights"),
        (["import", str(tmp_path / "r18.pth"), "--arch", "resnet34", "--out", new], "holds no resnet34: layer1.2"),
        (["import", str(tmp_path / "r18.pth"), "--stem", "cifa", "--out", new], "did you mean cifar?"),
        (["import", str(tmp_path / "r18.pth"), "--arch", "resnet19", "--out", new], "did you mean resnet18?"),
        (["import", str(tmp_path / "r18.pth"), "--arch", "resnet18", "--out", str(full)], "is not empty"),
    ]
    for words, expected in cases:
        capsys.readouterr()
        assert main(words) == 2, words
        output = capsys.readouterr()
        assert expected in output.err, (words, output.err)
        assert "code of the file was run" not in output.out
        assert output.err.count("\n") == 1, output.err
        assert output.err.strip().isprintable(), output.err
    assert not (tmp_path / "out.pth").exists()
    assert not (tmp_path / "new").exists()
