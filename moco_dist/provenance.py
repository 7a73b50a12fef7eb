"""What a result depends on beside its settings."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"


def source_hash(folder: Path = Path(__file__).parent) -> str:
    """16 hex digits of the contents of the Python files in `folder`: other code has others, under one version too."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def git_state() -> str:
    """Commit of the source folder, with `-dirty` where files differ from it; "" outside of a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, as installed here."""
    packages = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    return {"python": ".".join(map(str, sys.version_info[:3])), "moco_dist": __version__, **packages}


def hardware(device: str) -> str:
    """The GPU that `device` is, or the processor and the number of its cores that this process may use."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{cores} CPU cores of {line.split(':')[1].strip()}"
    return f"{cores} CPU cores of {platform.processor()}"
