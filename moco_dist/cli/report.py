"""`moco-dist report`."""

from pathlib import Path

from moco_dist.cli.arguments import Parser
from moco_dist.run.folder import RunFolder


def main(words: list[str]) -> int:
    """Accuracy table, and a page with pictures and curves."""
    parser = Parser("moco-dist report", description="accuracy table, pictures and curves of a run")
    parser.add_argument("run", type=Path, help="folder of the pre-training run")
    run_dir = parser.parse_args(words).run
    config = RunFolder(run_dir).settings()

    from moco_dist.evaluate.knn import nearest_examples
    from moco_dist.report.contact_sheet import view_pairs
    from moco_dist.report.page import accuracy_table, write_report
    from moco_dist.tracking import Tracker, ui_command

    page = write_report(run_dir, view_pairs(config, 8), nearest_examples(run_dir))
    with Tracker.reopen(run_dir) as tracker:
        tracker.log_artifact(page, "report")
    print(accuracy_table(run_dir))
    print(f"\nreport: {page}\nMLflow: {ui_command(run_dir)}")
    return 0
