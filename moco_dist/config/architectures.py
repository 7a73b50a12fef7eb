"""The networks that an encoder's backbone can be: four by a line each, all others by who builds them. No torch here."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from moco_dist.errors import UserError, nearest

# Name to the arguments of torchvision's ResNet; `block` is the name of a class beside it. A line here is all that a
# further ResNet takes: `width_per_group` and every other argument of ResNet may stand in it.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet10": {"block": "BasicBlock", "layers": [1, 1, 1, 1]},
    "resnet18": {"block": "BasicBlock", "layers": [2, 2, 2, 2]},
    "resnet34": {"block": "BasicBlock", "layers": [3, 4, 6, 3]},
    "resnet50": {"block": "Bottleneck", "layers": [3, 4, 6, 3]},
}
# Who builds a network that has no line above, and what follows the colon. Whether torchvision or timm has such a
# network, only they know: method/backbone.py asks them.
FAMILIES = {"torchvision": "NAME", "timm": "NAME", "module": "PACKAGE.MODULE:FUNCTION"}
TIMM = "timm:"  # before the name of a network whose weights timm has
KNOWN = ", ".join([*ARCHITECTURES, *(f"{family}:{name}" for family, name in FAMILIES.items())])


def family_of(arch: str) -> tuple[str, str]:
    """Who builds a network, and its name there: ("timm", "convnext_tiny"); ("", "resnet50") for one of ARCHITECTURES.

    Raises:
        UserError: it is none of KNOWN.
    """
    family, _, name = arch.partition(":")
    is_module = all(part.isidentifier() for part in name.replace(":", ".").split(".")) and name.count(":") == 1
    if arch in ARCHITECTURES:
        return "", arch
    if name and (is_module if family == "module" else family in FAMILIES):
        return family, name
    meant = [*ARCHITECTURES, *(f"{other}:{name or arch}" for other in FAMILIES if ":" in arch and other != "module")]
    raise UserError(f"{arch!r} is not one of {KNOWN}{nearest(arch, meant)}")


def is_known_without_torch(arch: str) -> bool:
    """Whether it is one of ARCHITECTURES: a ResNet, whose BatchNorm and stages nobody needs to build it for."""
    return arch in ARCHITECTURES


def missing_start(init: Path) -> str:
    """That `model.init` is not there, in a line; "" where it is, or where only timm can tell."""
    if str(init).startswith(TIMM) or init.exists():
        return ""
    return f"{init} does not exist; a file of weights, the folder of a run and {TIMM}NAME can be given"


def _checked(arch: str) -> str:
    family_of(arch)
    return arch


Architecture = Annotated[str, AfterValidator(_checked)]


def blocks_in(arch: str) -> int | None:
    """How many blocks the network has, over all its stages; None for one that is not of ARCHITECTURES."""
    return sum(ARCHITECTURES[arch]["layers"]) if is_known_without_torch(arch) else None
