"""The backbone: a network of torchvision or timm, or the user's own, without its classifier, made fit for a step.

A step has to be a function of the seed and the same at any world size and number of micro-batches. So every BatchNorm
becomes a grouped one; dropout and stochastic depth are switched off; and a network that still draws random numbers, or
that keeps something from one forward to the next, is refused. One pass over tensors without memory tells.
"""

import importlib
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet
from torchvision.models.resnet import ResNet

from moco_dist.config.architectures import ARCHITECTURES, family_of
from moco_dist.config.pretrain import ModelConfig
from moco_dist.errors import UserError, nearest
from moco_dist.method.batch_norm import GroupedBatchNorm2d, grouped


def build_backbone(config: ModelConfig) -> tuple[nn.Module, list[str]]:
    """The network that maps (N, 3, S, S) to features (N, D), with weights as its library draws them.

    Its state dict has its library's names.

    Returns:
        the network, and what was changed in it, in words.

    Raises:
        UserError: there is no such network, or it has a BatchNorm that cannot be grouped.
    """
    network = _BUILDERS[family_of(config.arch)[0]](config.arch)
    if config.stem == "cifar":
        if not isinstance(network, ResNet):
            raise UserError(f"model.stem cifar is one of ResNets, and model.arch {config.arch} is none; imagenet works")
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()  # type: ignore[assignment]
    for name, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm) and not isinstance(module, GroupedBatchNorm2d):
            network.set_submodule(name, grouped(module, config.bn_group_size, f"model.arch {config.arch}: {name}"))
    notes = []
    if rates := _switch_off_dropout(network):
        notes.append(f"dropout and stochastic depth (up to {max(rates):g}) are switched off: a step is a function of "
                     "the seed")  # fmt: skip
    if not has_batch_norm(network):
        notes.append(f"{config.arch} has no BatchNorm, for which keys are shuffled: they are not, and no rank needs "
                     "another one's images")  # fmt: skip
    return network.train(), notes


def build_resnet(arch: str) -> ResNet:
    """Torchvision's ResNet of one of `ARCHITECTURES`, or torchvision:NAME, with its `fc`.

    Raises:
        UserError: it is no ResNet.
    """
    if arch in ARCHITECTURES:
        arguments = {**ARCHITECTURES[arch]}
        return ResNet(getattr(resnet, arguments.pop("block")), **arguments)
    family, name = family_of(arch)
    network = of_torchvision(name) if family == "torchvision" else None
    if not isinstance(network, ResNet):
        raise UserError(f"{arch} is no ResNet of torchvision, and this is made of one")
    return network


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a network has statistics over samples, by which a query could know its key."""
    return any(isinstance(module, GroupedBatchNorm2d) for module in network.modules())


@torch.inference_mode(False)  # with gradients, whatever the caller has switched off
def feature_dim(network: nn.Module, config: ModelConfig, image_size: int) -> int:
    """D, found by a training pass over one BN group of tensors that have a shape and no memory.

    Raises:
        UserError: the network does not take such images, gives something else than (N, D), keeps state, draws random
            numbers, or has weights that the features do not depend on.
    """
    arch = f"model.arch {config.arch}"
    images = torch.empty(config.bn_group_size, 3, image_size, image_size, device="meta")
    weights = {name: _without_memory(p).requires_grad_(p.requires_grad) for name, p in network.named_parameters()}
    buffers = {name: _without_memory(b) for name, b in network.named_buffers()}
    versions, tensors, before = {k: b._version for k, b in buffers.items()}, {**weights, **buffers}, _plain(network)
    try:
        with _RandomOperations() as drawn:
            features = torch.func.functional_call(network, tensors, (images,))
    except Exception as error:  # a network's own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{arch} cannot be run on images of {image_size} pixels (data.image_size): {reason}") from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"{arch} gives {found} for {tuple(images.shape)}; a feature a sample (N, D) is expected")
    norms = {name for name, module in network.named_modules() if isinstance(module, GroupedBatchNorm2d)}
    own = [name for name in buffers if name.rpartition(".")[0] not in norms]
    state = [name for name in own if tensors[name] is not buffers[name] or buffers[name]._version != versions[name]]
    if state := state + [name for name, value in _plain(network).items() if value is not before.get(name)]:
        raise UserError(f"{arch} keeps state from one forward to the next ({state[0]}), so that how a batch "
                        "is cut would change its features; it cannot be trained here")  # fmt: skip
    if drawn.names:
        raise UserError(f"{arch} draws random numbers in its forward ({drawn.names[0]}), so that a step would be no "
                        "function of the seed; it cannot be trained here")  # fmt: skip
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    gradients = torch.autograd.grad(features.sum(), list(trained.values()), allow_unused=True)
    if unused := [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        raise UserError(f"{arch} has weights that its features do not depend on ({unused[0]}); take them out")
    return features.shape[1]


class _RandomOperations(TorchDispatchMode):
    """Remembers the operations inside that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _plain(network: nn.Module) -> dict[str, Any]:
    """The plain numbers and tensors that modules have as attributes."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | Tensor) and key != "training"
    }


def _switch_off_dropout(network: nn.Module) -> list[float]:
    """Set every rate of dropout and stochastic depth to 0; returns those that were not."""
    rates = []
    for module in network.modules():
        kind = type(module).__name__.lower()
        drops = "drop" in kind or kind == "stochasticdepth"
        for name, rate in list(vars(module).items()):
            if isinstance(rate, float) and rate > 0 and ("drop" in name or (drops and name in ("p", "prob"))):
                setattr(module, name, 0.0)
                rates.append(rate)
    return rates


def _resnet(arch: str) -> nn.Module:
    network = build_resnet(arch)
    network.fc = nn.Identity()  # type: ignore[assignment]
    return network


def of_torchvision(name: str) -> nn.Module:
    """A classifier of torchvision, its weights as drawn.

    Raises:
        UserError: there is none of this name; the nearest is named.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(f"model.arch torchvision:{name}: torchvision {torchvision.__version__} has no such classifier"
                        f"{nearest(name, names)}")  # fmt: skip
    return torchvision.models.get_model(name, weights=None)


def _torchvision_without_classifier(arch: str) -> nn.Module:
    network = of_torchvision(family_of(arch)[1])
    network.set_submodule(classifier_of(network, arch), nn.Identity())
    return network


def classifier_of(network: nn.Module, arch: str) -> str:
    """The name of the linear layer that ends a network of torchvision.

    Raises:
        UserError: it has none.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear or network.get_submodule(linear[-1]).out_features != 1000:
        raise UserError(f"model.arch {arch} has no linear classifier at its end that could be taken away")
    return linear[-1]


def of_timm(name: str, called: str, pretrained: bool = False) -> nn.Module:
    """A network of timm without its classifier.

    Args:
        name: timm's name for it.
        called: what gave the name, for messages.
        pretrained: whether it has timm's own weights, downloaded where they are not in timm's cache.

    Raises:
        UserError: timm is not installed, or has no network of this name; the nearest is named.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{called}: {error}; install it by pip install 'moco_dist[timm]'") from error
    if not timm.is_model(name):
        known = timm.list_models()
        raise UserError(f"{called}: timm {timm.__version__} has no such network{nearest(name, known)}")
    try:  # a vision transformer then takes images of any size, by resampling its position embeddings
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
    return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _timm_without_classifier(arch: str) -> nn.Module:
    return of_timm(family_of(arch)[1], f"model.arch {arch}")


def _of_user(arch: str) -> nn.Module:
    module, _, function = family_of(arch)[1].partition(":")
    try:
        network = getattr(importlib.import_module(module), function)()
    except Exception as error:  # the user's own
        raise UserError(f"model.arch {arch} cannot be built: {type(error).__name__}: {error}; the module is searched "
                        "on PYTHONPATH, and the function takes no arguments") from error  # fmt: skip
    if not isinstance(network, nn.Module):
        raise UserError(f"model.arch {arch} gives a {type(network).__name__}; a torch.nn.Module is expected")
    return network


_BUILDERS = {
    "": _resnet, "torchvision": _torchvision_without_classifier, "timm": _timm_without_classifier, "module": _of_user,
}  # fmt: skip
