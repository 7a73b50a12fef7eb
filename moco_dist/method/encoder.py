"""The encoder f: a backbone, a projection head, and the unit sphere (v1 sec. 3.3; v2 sec. 3)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from moco_dist.config.pretrain import ModelConfig
from moco_dist.method.backbone import build_backbone, feature_dim

IMAGENET_PIXELS = 224


class Encoder(nn.Module):
    """Images to points on the unit sphere.

    Attributes:
        backbone: the network without its classifier; its state dict has the names of its library.
        head: linear (v1), or an MLP with ReLU and no BatchNorm (v2).
        feature_dim: size of the backbone's output.
        notes: what was changed in the network, in words.
    """

    def __init__(self, config: ModelConfig, image_size: int = IMAGENET_PIXELS) -> None:
        """`image_size`: of the images that it is to be used on, in pixels.

        Raises:
            UserError: there is no such network, or no step can be made with it; see `backbone.py`.
        """
        super().__init__()
        self.backbone, self.notes = build_backbone(config)
        self.feature_dim = (
            512 * type(self.backbone.layer4[-1]).expansion  # type: ignore[index]
            if isinstance(self.backbone, ResNet)
            else feature_dim(self.backbone, config, image_size)
        )
        sizes = [self.feature_dim, *config.head_hidden_dims, config.embedding_dim]
        layers_of_head: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers_of_head += [nn.Linear(fan_in, fan_out), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers_of_head[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C), unit norm, never below float32 whatever the autocast."""
        z = self.head(self.backbone(images))
        return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def build_encoder(config: ModelConfig, seed: int, image_size: int = IMAGENET_PIXELS) -> Encoder:
    """The encoder with the same initial weights for the same seed, channels-last, on the CPU; see `Encoder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(config, image_size)
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
