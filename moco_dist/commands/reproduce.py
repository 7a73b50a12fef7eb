"""`moco-dist reproduce`."""

import shlex
from pathlib import Path

from moco_dist.commands.arguments import Parser
from moco_dist.errors import UserError, nearest


def main(words: list[str]) -> int:
    """A table of the paper: every row pre-trained, evaluated, and set beside the published number."""
    from moco_dist.reproduce import SMALL_EPOCHS, TABLES, as_markdown, jobs_of, run_jobs

    parser = Parser(
        "moco-dist reproduce", description="every row of a table of MoCo v2 (arXiv 2003.04297) beside the published"
    )
    parser.add_argument("table", help=f"{', '.join(TABLES)} (Table 3, memory and time: python -m benchmarks.table3)")
    parser.add_argument("--scale", default="full", help="full: as published; small: Fashion-MNIST, minutes [full]")
    parser.add_argument("--seeds", default="0", help="one run of each row for each, e.g. 0,1,2 [0]")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine, one a GPU [1]")
    parser.add_argument("--out", type=Path, help="folder for runs and table [runs/TABLE_SCALE]")
    parser.add_argument("--data-root", type=Path, help="images [those of the configs]")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the configs [configs]")
    parser.add_argument("--small-epochs", type=int, default=SMALL_EPOCHS,
                        help=f"small: epochs for each 200 of the row [{SMALL_EPOCHS}]")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands, for a launcher or by hand")
    args = parser.parse_args(words)
    if args.table == "table3":
        raise UserError("table3 is memory and time, which is a benchmark: python -m benchmarks.table3")
    for given, allowed, name in ((args.table, TABLES, "table"), (args.scale, ("full", "small"), "--scale")):
        if given not in allowed:
            raise UserError(f"{name} {given!r} is not one of {', '.join(allowed)}{nearest(given, allowed)}")
    seeds = args.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds {args.seeds!r} is not a list of whole numbers such as 0,1,2")
    if min(args.ranks, args.small_epochs) < 1:
        raise UserError("--ranks and --small-epochs are at least 1")

    out = args.out or Path("runs") / f"{args.table}_{args.scale}"
    jobs = jobs_of(
        args.table, args.scale, [int(seed) for seed in seeds], out, args.configs, args.data_root, args.small_epochs
    )
    if args.dry_run:
        for job in jobs:
            for command in job.commands:
                print(f"moco-dist {shlex.join(command)}")
        return 0
    try:
        run_jobs(jobs, args.ranks)
    finally:
        table = as_markdown(jobs, args.scale)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{args.table}.md").write_text(table, encoding="utf-8")
        print(f"\n{table}\ntable: {out / f'{args.table}.md'}")
    return 0
