"""`python -m moco_dist` and `torchrun -m moco_dist` are the `moco-dist` command."""

from moco_dist.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
