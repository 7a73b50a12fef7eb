"""`moco-dist sync`."""

import sys
from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.errors import EXIT_UNREACHABLE


def main(words: list[str]) -> int:
    """Deliver to MLflow what it has missed."""
    parser = Parser(
        "moco-dist sync", description="deliver to MLflow what it has missed of a run and of its evaluations, once"
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run; MLFLOW_TRACKING_URI may have the credentials")
    args = parser.parse_args(words)

    from moco_dist.tracking import sync

    done, undone = sync(args.run_dir)
    print("\n".join(done))
    for line in undone:
        print(f"error: {line}", file=sys.stderr)
    return EXIT_UNREACHABLE if undone else 0
