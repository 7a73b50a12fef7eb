"""`moco-dist knn` and `moco-dist linear`."""

from moco_dist.commands.configured import config_or_help
from moco_dist.config_evaluate import KnnConfig, LinearConfig

PEER_TIMEOUT_SECONDS = 60.0  # a pre-training has run.peer_timeout_seconds


def knn(words: list[str]) -> int:
    """Nearest-neighbour accuracy of what a run learned."""
    config = config_or_help("knn", KnnConfig, words)
    return 0 if config is None else _evaluate("knn", config)


def linear(words: list[str]) -> int:
    """Linear evaluation of what a run learned."""
    config = config_or_help("linear", LinearConfig, words)
    return 0 if config is None else _evaluate("linear", config)


def _evaluate(command: str, config: KnnConfig | LinearConfig) -> int:
    from moco_dist.distributed.collectives import process_group
    from moco_dist.distributed.heartbeat import Heartbeat
    from moco_dist.distributed.world import world_from_env
    from moco_dist.evaluate.knn import run_knn
    from moco_dist.evaluate.linear import run_linear
    from moco_dist.tracking import Tracker

    world = world_from_env(config.device)
    with process_group(world), Heartbeat(world, PEER_TIMEOUT_SECONDS):
        results = run_knn(config, world) if isinstance(config, KnnConfig) else run_linear(config, world)
        if world.is_main:
            for result in results:
                accuracies = "  ".join(f"{name} {value:.2f} %" for name, value in result["accuracy"].items())
                print(f"{result['encoder']}: {accuracies}")
                with Tracker.for_evaluation(config, command, result["encoder"]) as tracker:
                    tracker.log_metrics(result["step"], result["accuracy"])
    return 0
