"""A network is declared in one line, and config, encoder, detector, import and help know it."""

import pytest
import torchvision

from moco_dist.cli.main import main
from moco_dist.config.architectures import ARCHITECTURES, KNOWN, blocks_in
from moco_dist.config.evaluate import DetectConfig
from moco_dist.config.pretrain import ModelConfig, PretrainConfig
from moco_dist.config.source import help_text
from moco_dist.method.backbone import build_resnet


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_network_is_torchvisions(arch):
    network = build_resnet(ModelConfig(arch=arch).arch)
    assert sum(name.endswith(".conv1") for name, _ in network.named_modules()) == blocks_in(arch)
    if theirs := getattr(torchvision.models, arch, None):
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in theirs().state_dict().items()}


def test_a_line_more_is_a_network_more(monkeypatch):
    wide = {"block": "Bottleneck", "layers": [3, 4, 6, 3], "width_per_group": 128}
    monkeypatch.setitem(ARCHITECTURES, "wide_resnet50_2", wide)
    weights = build_resnet("wide_resnet50_2").state_dict()
    theirs = torchvision.models.wide_resnet50_2().state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {k: v.shape for k, v in theirs.items()}


def test_help_names_all_networks(capsys):
    for schema in (PretrainConfig, DetectConfig):
        assert KNOWN in " ".join(help_text(schema).split())
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    assert KNOWN in " ".join(capsys.readouterr().out.split())
