"""`moco-dist detect`."""

from moco_dist.cli.configured import config_or_help
from moco_dist.cli.imports import quick_imports
from moco_dist.cli.ranks import ranks
from moco_dist.config.evaluate import DetectConfig


def main(words: list[str]) -> int:
    """Average precision of Faster R-CNN on a backbone."""
    config = config_or_help("detect", DetectConfig, words)
    if config is None:
        return 0
    with quick_imports():
        from moco_dist.evaluate.detection.run import run_detection
        from moco_dist.tracking import Tracker

    with ranks(config) as world:
        result = run_detection(config, world)
        if world.is_main:
            ap50, ap, ap75 = result["accuracy"].values()
            print(f"AP50 {ap50:.2f}  AP {ap:.2f}  AP75 {ap75:.2f} %, on {result['num_test']} images")
            with Tracker.for_evaluation(config, "detect", "trained") as tracker:
                tracker.log_metrics(result["step"], result["accuracy"])
    return 0
