"""`moco-dist configs`: what comes with the package, to use by name."""

from moco_dist.cli.arguments import Parser
from moco_dist.config import packaged


def main(words: list[str]) -> int:
    """List the packaged configs with what they say of themselves, or show one whole."""
    parser = Parser("moco-dist configs", description="the configs that come with moco_dist: each is given by its name")
    actions = parser.add_subparsers(dest="action")
    show = actions.add_parser("show", help="print one, to read, or to edit as a file of your own")
    show.add_argument("name", help="as moco-dist configs lists it")
    args = parser.parse_args(words)
    if args.action == "show":
        print(packaged.text(args.name), end="")
        return 0
    for name in packaged.names():
        print("\n".join([name, *(f"    {line}" for line in packaged.header(name)), ""]))
    return 0
