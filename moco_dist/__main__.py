"""`python -m moco_dist` and `torchrun -m moco_dist` are the `moco-dist` command."""

from moco_dist.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
