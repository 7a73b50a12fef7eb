"""`moco-dist knn`, `moco-dist linear` and `moco-dist finetune`."""

from moco_dist.cli.configured import config_or_help
from moco_dist.cli.imports import quick_imports
from moco_dist.cli.ranks import ranks
from moco_dist.config.evaluate import FinetuneConfig, KnnConfig, LinearConfig


def knn(words: list[str]) -> int:
    """Nearest-neighbour accuracy of what a run learned."""
    config = config_or_help("knn", KnnConfig, words)
    return 0 if config is None else _evaluate("knn", config)


def linear(words: list[str]) -> int:
    """Linear evaluation of what a run learned."""
    config = config_or_help("linear", LinearConfig, words)
    return 0 if config is None else _evaluate("linear", config)


def finetune(words: list[str]) -> int:
    """Accuracy of the whole network, trained further with labels."""
    config = config_or_help("finetune", FinetuneConfig, words)
    return 0 if config is None else _evaluate("finetune", config)


def _evaluate(command: str, config: KnnConfig | LinearConfig | FinetuneConfig) -> int:
    with quick_imports():
        from moco_dist.evaluate.finetune import run_finetune
        from moco_dist.evaluate.knn import run_knn
        from moco_dist.evaluate.linear import run_linear
        from moco_dist.tracking import Tracker

    with ranks(config) as world:
        if isinstance(config, KnnConfig):
            results = run_knn(config, world)
        elif isinstance(config, LinearConfig):
            results = run_linear(config, world)
        else:
            results = run_finetune(config, world)
        if world.is_main:
            for result in results:
                accuracies = "  ".join(f"{name} {value:.2f} %" for name, value in result["accuracy"].items())
                print(f"{result['encoder']}: {accuracies}")
                with Tracker.for_evaluation(config, command, result["encoder"], result["variant"]) as tracker:
                    # A part of the labels or of the head has names of its own, or `compare` would mix them up.
                    named = {f"{name}{result['variant']}": value for name, value in result["accuracy"].items()}
                    tracker.log_metrics(result["step"], named)
    return 0
