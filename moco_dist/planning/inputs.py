"""What a plan is made of: the config's sizes, what was measured, and how many images there are."""

from dataclasses import dataclass
from pathlib import Path

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.sources import find_training_images
from moco_dist.errors import UserError
from moco_dist.planning import arithmetic, measurements
from moco_dist.planning.arithmetic import Sizes
from moco_dist.planning.measurements import CoreSeconds, Measurement


@dataclass(frozen=True)
class Inputs:
    """Everything that a plan depends on.

    Attributes:
        gpu: part of the hardware's name; None: any that was measured.
        link_gigabit_per_second: of a host; None: as measured between hosts, if it was.
        num_images: in the data set, and where that number comes from; None: not known.
        known: all measurements.
        benchmark: seconds of the loader a file, for where no measurement has timed it.
        places: the folders that measurements were looked for in.
    """

    config: PretrainConfig
    sizes: Sizes
    gpu: str | None
    link_gigabit_per_second: float | None
    num_images: tuple[int, str] | None
    known: list[Measurement]
    benchmark: CoreSeconds | None = None
    places: str = ""


def gather(
    config: PretrainConfig, num_nodes: int, local_world_size: int, gpu: str | None,
    link_gigabit_per_second: float | None, num_images: int | None, folders: list[Path],
) -> Inputs:  # fmt: skip
    """Read the measurements of `folders`, and count the images if `num_images` does not say how many there are.

    Raises:
        UserError: a file with measurements is damaged.
    """
    return Inputs(
        config, arithmetic.sizes(config, num_nodes * local_world_size, local_world_size), gpu,
        link_gigabit_per_second, _num_images(config, num_images), measurements.read(folders),
        measurements.benchmark_of_loader(folders, config), ", ".join(map(str, folders)),
    )  # fmt: skip


def _num_images(config: PretrainConfig, given: int | None) -> tuple[int, str] | None:
    if given is not None:
        return given, "--num-images"
    try:
        return len(find_training_images(config.data).paths), "found in data.root"
    except UserError:
        return None
