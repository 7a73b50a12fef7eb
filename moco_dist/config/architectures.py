"""The networks that an encoder's backbone can be: one line each, from which all else follows. No torch here."""

from typing import TYPE_CHECKING, Any, Literal

# Name to the arguments of torchvision's ResNet; `block` is the name of a class beside it.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet10": {"block": "BasicBlock", "layers": [1, 1, 1, 1]},
    "resnet18": {"block": "BasicBlock", "layers": [2, 2, 2, 2]},
    "resnet34": {"block": "BasicBlock", "layers": [3, 4, 6, 3]},
    "resnet50": {"block": "Bottleneck", "layers": [3, 4, 6, 3]},
}

if TYPE_CHECKING:
    Architecture = str  # what a type checker can follow of the next line
else:
    Architecture = Literal[tuple(ARCHITECTURES)]


def blocks_in(arch: str) -> int:
    """How many blocks the network has, over all its stages."""
    return sum(ARCHITECTURES[arch]["layers"])
