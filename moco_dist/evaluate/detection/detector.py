"""Faster R-CNN as MoCo measures a backbone: R50-C4 with trained BatchNorm (v1, arXiv 1911.05722, sec. 4.2 and A.2).

It is torchvision's `FasterRCNN` itself: the builder `fasterrcnn_resnet50_fpn` would put a feature pyramid on the
backbone, which the paper's VOC numbers do not have. Features are those of layer3, at stride 16; regions of them go
through layer4, a further BatchNorm and the mean. Anchors, numbers of proposals and short sides are those of the
original release's configuration for detectron2. What stays torchvision's: the box losses are smooth (beta 1/9) instead
of L1, images are resized without antialiasing, and BatchNorm's running statistics are its moving averages, not measured
again at the end.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign

from moco_dist.config.evaluate import DetectConfig
from moco_dist.config.pretrain import AugmentConfig
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.method.backbone import build_resnet
from moco_dist.run.weights import Backbone

ANCHOR_SIDES = (32, 64, 128, 256, 512)  # pixels
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
MAX_SIDE = 1333  # pixels, of the long side
REGION_CELLS = 14  # of layer3, along a side of a region; layer4 halves them


class Trunk(nn.Sequential):
    """A ResNet up to layer3: images to features at stride 16."""

    def __init__(self, resnet: ResNet) -> None:
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        super().__init__(OrderedDict((name, resnet.get_submodule(name)) for name in names))
        self.out_channels = resnet.fc.in_features // 2


class RegionHead(nn.Module):
    """layer4 on the features of regions, with a BatchNorm behind it: (n, D/2, 14, 14) to (n, D)."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        self.layer4 = resnet.layer4
        self.norm = nn.BatchNorm2d(resnet.fc.in_features)

    def forward(self, regions: Tensor) -> Tensor:
        """(n, D/2, 14, 14) to (n, D)."""
        return self.norm(self.layer4(regions)).mean(dim=(2, 3))


def build_detector(backbone: Backbone, config: DetectConfig, pixels: AugmentConfig, world: World) -> FasterRCNN:
    """The detector with the backbone's weights; what is new has the same initial weights for the same seed.

    Args:
        backbone: a ResNet with ImageNet's stem.
        config: seed, classes, short sides.
        pixels: mean and std of the pre-training.
        world: with several GPUs, BatchNorm takes the statistics of all ranks' images; on CPUs, of its own.

    Raises:
        UserError: the backbone has the stem for small images.
    """
    model = backbone.model
    if model.stem != "imagenet":
        raise UserError(f"model.stem {model.stem} is for images of about 32 pixels; detection needs the stem imagenet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        resnet = build_resnet(model.arch)
        missing = resnet.load_state_dict(backbone.tensors, strict=False)
        assert set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys
        detector = FasterRCNN(
            Trunk(resnet),
            min_size=sorted(config.short_sides),  # type: ignore[arg-type]  # its own type is too narrow
            max_size=MAX_SIDE,
            image_mean=list(pixels.mean),
            image_std=list(pixels.std),
            rpn_anchor_generator=AnchorGenerator((ANCHOR_SIDES,), (ANCHOR_RATIOS,)),
            rpn_pre_nms_top_n_train=12_000,
            rpn_pre_nms_top_n_test=6_000,
            box_roi_pool=MultiScaleRoIAlign(["0"], REGION_CELLS, sampling_ratio=0),
            box_head=RegionHead(resnet),
            box_predictor=FastRCNNPredictor(resnet.fc.in_features, len(config.data.classes) + 1),
        )
    if world.world_size > 1 and world.device != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(detector)  # in place, unless the module is a BatchNorm itself
    return detector.to(world.device)


def weight_groups(detector: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters for SGD: BatchNorm's without weight decay, as in detectron2."""
    norms = [p for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]
    ids = {id(parameter) for parameter in norms}
    others = [parameter for parameter in detector.parameters() if id(parameter) not in ids]
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
