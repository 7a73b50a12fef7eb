"""Networks of torchvision, timm and a user, from pre-training to export; and what is refused."""

import re
import sys

import onnxruntime
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from moco_dist.cli.main import main
from moco_dist.config.pretrain import ModelConfig, PretrainConfig
from moco_dist.data.plan import plan_of
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.method.backbone import feature_dim
from moco_dist.method.batch_norm import GroupedBatchNorm2d
from moco_dist.method.build import settled
from moco_dist.method.encoder import Encoder, build_encoder
from moco_dist.planning.arithmetic import sizes
from moco_dist.run.logbook import read_log
from moco_dist.run.size import checkpoint_bytes
from moco_dist.run.weights import backbone_of_run, load_trained
from tests.distributed.program import largest_difference, run_program, small_config
from tests.world import run

OWN = "module:tests.own_network:build"
WITH_BATCH_NORM = [
    "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5", "timm:test_resnet", "timm:test_efficientnet",
    OWN,
]  # fmt: skip
WITHOUT = "timm:test_vit"
FORMAT = {"torchvision": ".pth", "timm": ".safetensors", "module": ".safetensors"}
TINY = [
    "--model.head-hidden-dims", "[16]", "--model.embedding-dim", "8", "--model.bn-group-size", "4",
    "--moco.queue-size", "64", "--optim.global-batch-size", "16", "--optim.epochs", "1",
    "--data.image-size", "32", "--data.num-workers", "0", "--log.every-steps", "1", "--tracking.backend", "none",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*WITH_BATCH_NORM, WITHOUT])
def test_a_network_goes_the_whole_way(arch, tiny_data, tmp_path, capsys):
    run_dir, family = tmp_path / "run", arch.partition(":")[0]
    words = ["pretrain", "--data.root", str(tiny_data), "--run.dir", str(run_dir), "--model.arch", arch, *TINY]
    assert main([*words, "--run.stop-at-step", "2"]) == 0
    assert main(words) == 0
    told = capsys.readouterr().out
    assert ("keys are not shuffled" in told) == (arch == WITHOUT)
    assert ("dropout and stochastic depth (up to 0.2) are switched off" in told) == ("mobilenet" in arch)
    assert [line["step"] for line in read_log(run_dir)] == [1, 2, 3, 4, 5]
    assert main(["knn", "--run-dir", str(run_dir), "--encoders", "[trained]", "--tracking", "none", "--neighbours", "5",
                 "--data.num-workers", "0"]) == 0  # fmt: skip

    format = "safetensors" if family == "module" else family
    file = tmp_path / f"weights{FORMAT[family]}"
    assert main(["export", str(run_dir), "--format", format, "--out", str(file)]) == 0
    how = capsys.readouterr().out.splitlines()[-1].strip()
    encoder = build_encoder(ModelConfig(arch=arch, head_hidden_dims=(16,), embedding_dim=8), 5, 32).eval()
    assert load_trained(encoder, run_dir) == 5
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = encoder.backbone(images)
        if family == "torchvision":
            names = {}
            exec(how, {"torch": torch, "torchvision": torchvision}, names)
            torch.testing.assert_close(names["model"].eval()(images), expected, atol=1e-5, rtol=1e-5)
        elif family == "timm":
            model = timm.create_model(arch[5:], num_classes=0, checkpoint_path=str(file), **(
                {"dynamic_img_size": True} if arch == WITHOUT else {}))  # fmt: skip
            torch.testing.assert_close(model.eval()(images), expected, atol=1e-5, rtol=1e-5)
            folder = tmp_path / "hub"
            assert main(["export", str(run_dir), "--format", "huggingface", "--out", str(folder)]) == 0
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
            torch.testing.assert_close(model.eval()(images), expected, atol=1e-5, rtol=1e-5)
            model = transformers.AutoModel.from_pretrained(folder)
            torch.testing.assert_close(model.eval()(images).pooler_output, expected, atol=1e-5, rtol=1e-5)
        assert main(["export", str(run_dir), "--format", "onnx", "--out", str(tmp_path / "graph.onnx")]) == 0
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
        for count in (1, 2):
            (found,) = session.run(["features"], {"images": images[:count].numpy()})
            torch.testing.assert_close(torch.from_numpy(found), expected[:count], atol=1e-5, rtol=1e-5)

    assert main(["import", str(file), "--arch", arch, "--out", str(tmp_path / "again")]) == 0
    again, trained = backbone_of_run(tmp_path / "again").tensors, backbone_of_run(run_dir).tensors
    assert all(torch.equal(again[name], value) for name, value in trained.items() if "num_batches" not in name)


def outcomes(world, archs):
    """Of two steps of each network."""
    optim = {"global_batch_size": 32, "precision": "fp64", "base_lr": 0.1}
    return [run_program(world, small_config(model={"arch": arch}, optim=optim), 2) for arch in archs]


@pytest.mark.slow
def test_two_ranks_compute_what_one_does_in_float64():
    (alone,), together = run(outcomes, 1, WITH_BATCH_NORM), run(outcomes, 2, WITH_BATCH_NORM)
    for arch, expected, *found in zip(WITH_BATCH_NORM, alone, *together, strict=True):
        for ours in found:
            for name in ("losses", "query_encoder", "key_encoder", "running_q", "running_k", "queue"):
                assert largest_difference(ours[name], expected[name]) < 1e-9, (arch, name)


def config_of(arch, **shuffle):
    return PretrainConfig.model_validate({
        "run": {"dir": "r"}, "data": {"root": "d", "image_size": 32}, "model": {"arch": arch, "bn_group_size": 4},
        "optim": {"global_batch_size": 16}, "shuffle": shuffle,
    })  # fmt: skip


def test_without_batch_norm_every_rank_makes_the_keys_of_its_own_samples():
    config = settled(config_of(WITHOUT))
    assert settled(config) == config and config.shuffle.block_size == 1
    plan, worlds = plan_of(config, 40), [World(rank, rank, 4, 4) for rank in range(4)]
    for world in worlds:
        assert plan.key_indices(3, world).tolist() == plan.query_indices(3, world).tolist()
        assert list(plan.mates("all_to_all", world)) == [world.rank]
    assert settled(config_of(OWN)) == config_of(OWN)
    with pytest.raises(UserError, match="shuffle.block_size 1: model.arch module.* has BatchNorm"):
        settled(config_of(OWN, block_size=1))
    with pytest.raises(ValueError, match="shuffle.block_size 1 has to be two or more BN groups"):
        config_of("resnet18", block_size=1)


def test_every_batch_norm_is_grouped_and_keeps_what_it_was():
    encoder = Encoder(ModelConfig(arch="timm:test_efficientnet", bn_group_size=4), 32)
    plain = timm.create_model("test_efficientnet", num_classes=0)
    plain.load_state_dict(encoder.backbone.state_dict())
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, GroupedBatchNorm2d) and norm.then == ("drop", "act") for norm in norms)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    expected = [plain.double()(group) for group in images.split(4)]
    torch.testing.assert_close(encoder.backbone.double()(images), torch.cat(expected))


def test_plan_counts_any_network():
    config = settled(config_of("torchvision:shufflenet_v2_x0_5"))
    counted = sizes(config, 2, 2)
    assert counted.parameters == sum(p.numel() for p in Encoder(config.model, 32).parameters())
    assert checkpoint_bytes(config, 2) > 3 * 4 * counted.parameters


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("timm:convnext_tinny", "timm .* has no such network; did you mean convnext_tiny"),
        ("torchvision:resnet51", "has no such classifier; did you mean resnet50"),
        ("torchvision:squeezenet1_1", "no linear classifier"),
        ("torchvision:vit_b_16", "cannot be run on images of 32 pixels .*Expected 224"),
        ("module:tests.own_network:missing", "cannot be built: AttributeError"),
        ("module:no.such.place:build", "No module named 'no'.*PYTHONPATH"),
        ("module:tests.own_network:no_network", "gives a int"),
        ("module:tests.own_network:maps", r"gives \(4, 3, 32, 32\) for"),
        ("module:tests.own_network:counts", r"keeps state .*\(calls\)"),
        ("module:tests.own_network:remembers", r"keeps state .*\(seen\)"),
        ("module:tests.own_network:random", "draws random numbers .*bernoulli"),
        ("module:tests.own_network:unused", r"do not depend on \(unused.weight\)"),
        ("module:tests.own_network:own_norm", "OwnNorm, a BatchNorm of which it is not known"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_in_a_line(arch, told):
    with pytest.raises(UserError, match=told) as error:
        Encoder(ModelConfig(arch=arch, bn_group_size=4), 32)
    assert len(str(error.value).splitlines()) == 1


def test_the_pass_over_the_network_leaves_it_as_it_was():
    config = ModelConfig(arch=OWN, bn_group_size=4)
    network = build_encoder(config, 0, 32).backbone
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert feature_dim(network, config, 32) == 24
    with torch.no_grad():
        assert feature_dim(network, config, 32) == 24
    with torch.inference_mode():
        assert feature_dim(network, config, 32) == 24
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("arch", "told"),
    [("resnet51", "did you mean resnet50"), ("tim:vit", "did you mean timm:vit"), ("timm:", "timm:NAME"),
     ("module:a.b", "module:PACKAGE.MODULE:FUNCTION")],
)  # fmt: skip
def test_a_name_that_nobody_can_build_is_refused_by_the_config(arch, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        ModelConfig(arch=arch)


def test_without_timm_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'moco_dist\[timm\]'"):
        Encoder(ModelConfig(arch="timm:convnext_tiny"))
