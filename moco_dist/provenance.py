"""What a result depends on beside its settings."""

import subprocess
from pathlib import Path


def git_state() -> str:
    """Commit of the source folder, with `-dirty` where files differ from it; "" outside of a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
