"""What a result depends on beside its settings."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path


def git_state() -> str:
    """Commit of the source folder, with `-dirty` where files differ from it; "" outside of a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, as installed here."""
    packages = {name: metadata.version(name) for name in ("moco_dist", "torch", "torchvision", "numpy", "pillow")}
    return {"python": ".".join(map(str, sys.version_info[:3])), **packages}
