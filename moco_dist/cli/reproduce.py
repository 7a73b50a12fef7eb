"""`moco-dist reproduce`."""

import functools
import shlex
from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.config.address import Url
from moco_dist.errors import UserError, nearest


def main(words: list[str]) -> int:
    """A table of the paper: every row pre-trained, evaluated, and set beside the published number."""
    from moco_dist.reproduce.submission import submit, submitted
    from moco_dist.reproduce.tables import SMALL_EPOCHS, TABLES, as_markdown, on_this_machine, run_trials, trials_of

    parser = Parser(
        "moco-dist reproduce",
        description="every row of a table of MoCo v2 (arXiv 2003.04297) beside the published",
        epilog="with --launcher, its options as well: moco-dist launch LAUNCHER --help shows them",
    )
    parser.add_argument("table", help=f"{', '.join(TABLES)}, table3 (memory and time, in minutes)")
    parser.add_argument("--scale", default="full", help="full: as published; small: Fashion-MNIST, minutes [full]")
    parser.add_argument("--seeds", default="0", help="one run of each row for each, e.g. 0,1,2 [0]")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine, one a GPU [1]")
    parser.add_argument("--out", type=Path, help="folder for runs and table [runs/TABLE_SCALE]")
    parser.add_argument("--data-root", type=Url, help="images [those of the configs]")
    parser.add_argument("--configs", type=Path, default=Path(),
                        help="folder of configs of your own, under the same names [those of moco_dist]")  # fmt: skip
    parser.add_argument("--small-epochs", type=int, default=SMALL_EPOCHS,
                        help=f"small: epochs for each 200 of the row [{SMALL_EPOCHS}]")  # fmt: skip
    parser.add_argument("--launcher", help="submit every row: slurm, kubernetes, torchrun [run them here]")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, or what would be submitted")
    args, options = parser.parse_known_args(words)
    if args.launcher is None or args.table == "table3":
        args, options = parser.parse_args(words), []  # which tells what is nobody's
    tables = (*TABLES, "table3")
    for given, allowed, name in ((args.table, tables, "table"), (args.scale, ("full", "small"), "--scale")):
        if given not in allowed:
            raise UserError(f"{name} {given!r} is not one of {', '.join(allowed)}{nearest(given, allowed)}")
    seeds = list(dict.fromkeys(args.seeds.split(",")))
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds {args.seeds!r} is not a list of whole numbers such as 0,1,2")
    if not args.configs.is_dir():
        raise UserError(f"--configs {args.configs} is not a folder; without it, moco_dist's own configs are used")
    if min(args.ranks, args.small_epochs) < 1:
        raise UserError("--ranks and --small-epochs are at least 1")

    out = args.out or Path("runs") / f"{args.table}_{args.scale}"
    if args.table == "table3":
        from moco_dist.planning import table3

        if args.ranks > 1 or args.dry_run:
            raise UserError(f"table3 times one rank with its share of a batch of {table3.RANKS}, without --ranks and "
                            "--dry-run")  # fmt: skip
        kept = out / ".table3.json"
        _write(table3.table(args.configs, args.scale == "small", kept), out / "table3.md")
        kept.unlink(missing_ok=True)
        return 0
    trials = trials_of(
        args.table, args.scale, [int(seed) for seed in seeds], out, args.configs, args.data_root, args.small_epochs
    )
    if args.launcher is not None:
        submit(trials, args.launcher, options, out, args.dry_run)
        if not args.dry_run:
            _write(as_markdown(trials, args.scale), out / f"{args.table}.md")
        return 0
    if args.dry_run:
        for trial in trials:
            for command in trial.commands:
                print(f"moco-dist {shlex.join(command)}")
        return 0
    elsewhere = submitted(out)
    for trial in trials:
        if trial.result is None and (by := elsewhere.get(trial.run_dir.name)):
            print(f"{trial.row.label}, seed {trial.seed}: left to {by[0]}, job {', '.join(by[1:])}")
    try:
        here = [trial for trial in trials if trial.run_dir.name not in elsewhere]
        run_trials(here, functools.partial(on_this_machine, num_ranks=args.ranks))
    finally:
        _write(as_markdown(trials, args.scale), out / f"{args.table}.md")
    return 0


def _write(table: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table, encoding="utf-8")
    print(f"\n{table}\ntable: {path}")
