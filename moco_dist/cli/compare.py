"""`moco-dist compare`."""

import os
from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.errors import UserError


def main(words: list[str]) -> int:
    """Several runs side by side; with --register, the best of them in MLflow's model registry."""
    parser = Parser(
        "moco-dist compare", description="a table of what differs and what came out, overlaid curves, CSV and Markdown"
    )
    parser.add_argument("runs", type=Path, nargs="*", help="folders of runs, any number")
    parser.add_argument("--experiment", help="all pre-trainings of an MLflow experiment instead")
    parser.add_argument("--uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="of MLflow [MLFLOW_TRACKING_URI]")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder to write [default: comparison]")
    parser.add_argument("--register", metavar="NAME", help="register the best backbone as a version of model NAME")
    args = parser.parse_args(words)
    if bool(args.runs) == bool(args.experiment):
        raise UserError("compare needs either folders of runs or --experiment NAME")
    if args.experiment and not args.uri:
        raise UserError("--experiment needs --uri, or MLFLOW_TRACKING_URI: sqlite:///mlflow.db or http://HOST:PORT")
    if args.experiment and args.register:
        raise UserError("--register needs folders of runs: the weights are there")

    from moco_dist.report.compare import as_markdown, compare, run_of_folder, runs_of_experiment, write_comparison
    from moco_dist.report.registry import best_run, register

    if args.experiment:
        records = runs_of_experiment(args.experiment, args.uri)
    else:
        records = [run_of_folder(folder) for folder in args.runs]
    comparison = compare(records)
    page = write_comparison(comparison, args.out)
    print(as_markdown(comparison))
    print(f"page: {page}")
    if args.register:
        number = best_run(records)
        version = register(args.runs[number], args.register)
        print(f"registered: {records[number].name} as version {version} of {args.register}")
    return 0
