"""`moco-dist report`."""

from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.cli.imports import quick_imports
from moco_dist.config.address import Url
from moco_dist.run.folder import RunFolder


def main(words: list[str]) -> int:
    """Accuracy table, and a page with pictures and curves."""
    parser = Parser("moco-dist report", description="accuracy table, pictures and curves of a run")
    parser.add_argument("run", type=Path, help="folder of the pre-training run")
    parser.add_argument("--data-root", type=Url, help="where its images are now [default: the run's data.root]")
    args = parser.parse_args(words)
    run_dir = args.run
    config = RunFolder(run_dir).settings()
    before = config.data.root
    if args.data_root:
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": args.data_root})})

    with quick_imports():
        from moco_dist.report.contact_sheet import pairs_for_report, stored_images
        from moco_dist.report.map import map_of_run
        from moco_dist.report.page import accuracy_table, write_report
        from moco_dist.run.results import nearest_examples
        from moco_dist.tracking import Tracker, ui_command

    neighbours = nearest_examples(run_dir, before, config.data.root)
    indices = RunFolder(run_dir).indices
    stored = stored_images(neighbours, config.data.root, indices)
    page = write_report(run_dir, pairs_for_report(config, 8, indices), neighbours, map_of_run(run_dir), stored)
    with Tracker.reopen(run_dir) as tracker:
        tracker.log_artifact(page, "report")
    print(accuracy_table(run_dir))
    print(f"\nreport: {page}\nMLflow: {ui_command(run_dir)}")
    return 0
