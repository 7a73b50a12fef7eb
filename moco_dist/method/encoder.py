"""The encoder f: a torchvision ResNet, a projection head, and the unit sphere (v1 sec. 3.3; v2 sec. 3)."""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import ResNet

from moco_dist.config.architectures import ARCHITECTURES
from moco_dist.config.pretrain import ModelConfig
from moco_dist.method.batch_norm import GroupedBatchNorm2d


class Encoder(nn.Module):
    """Images to points on the unit sphere.

    Attributes:
        backbone: torchvision's ResNet with `fc` taken out; its state dict has torchvision's names.
        head: linear (v1), or an MLP with ReLU and no BatchNorm (v2).
        feature_dim: size of the backbone's output.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = functools.partial(GroupedBatchNorm2d, group_size=config.bn_group_size)
        self.backbone = build_resnet(config.arch, norm)
        self.feature_dim = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()  # type: ignore[assignment]
        if config.stem == "cifar":
            self.backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.backbone.maxpool = nn.Identity()  # type: ignore[assignment]
        sizes = [self.feature_dim, *config.head_hidden_dims, config.embedding_dim]
        layers_of_head: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers_of_head += [nn.Linear(fan_in, fan_out), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers_of_head[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C), unit norm, never below float32 whatever the autocast."""
        z = self.head(self.backbone(images))
        return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def build_resnet(arch: str, norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d) -> ResNet:
    """Torchvision's ResNet of one of `ARCHITECTURES`, with its `fc`."""
    arguments = {**ARCHITECTURES[arch]}
    return ResNet(getattr(resnet, arguments.pop("block")), norm_layer=norm_layer, **arguments)


def build_encoder(config: ModelConfig, seed: int) -> Encoder:
    """The encoder with the same initial weights for the same seed, channels-last, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(config)
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
