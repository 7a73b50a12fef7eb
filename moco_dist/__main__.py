"""`python -m moco_dist` and `torchrun -m moco_dist` are the `moco-dist` command."""

from moco_dist.cli.main import command

if __name__ == "__main__":
    command()
