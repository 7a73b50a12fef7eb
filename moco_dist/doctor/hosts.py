"""The findings about a pre-training of every host that the doctor runs on, and what they say together."""

import dataclasses
import json
import socket
import time

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.sources import find_images, find_training_images
from moco_dist.distributed.world import world_from_env
from moco_dist.doctor import machine, network, settings
from moco_dist.doctor.finding import Finding, fine, problem
from moco_dist.errors import UserError


def findings(
    config: PretrainConfig, with_data: bool, num_nodes: int | None, gpus_per_node: int | None
) -> list[Finding] | None:
    """Look at this host, and gather what the others found; None on all ranks but the first. Called by all ranks.

    Args:
        config: of the planned run, as `settled` has it.
        with_data: whether data.root is looked at.
        num_nodes: hosts of the planned run; None: those here.
        gpus_per_node: its ranks on each of them; None: this host's GPUs, or the ranks that run here.
    """
    world = world_from_env("cpu")  # gloo answers on any host, also where a GPU is what is wrong
    gpus = 0 if config.run.device == "cpu" else machine.num_gpus()
    here = world.local_world_size if world.world_size > 1 else max(1, gpus)
    ranks = gpus_per_node or here
    world_size = ranks * (num_nodes or world.num_nodes)
    found, num_images = _data(config) if with_data else ([], None)
    found += machine.check(config, ranks, world_size)
    found += [*machine.packages(config), *network.interfaces(), network.host_name()]
    found.append(network.mlflow_server(config.tracking))
    if world.is_main:
        found += machine.start(config)
        found += settings.pretraining(config, world_size, ranks, num_images)
    if world.world_size == 1:
        return found
    from moco_dist.distributed import collectives  # here: one process alone is answered without torch

    with collectives.process_group(world):
        collectives.barrier(world)
        facts = {"host": socket.gethostname(), "time": time.time(), "is_first": world.local_rank == 0,
                 "findings": [vars(finding) for finding in found]}  # fmt: skip
        gathered = [json.loads(text) for text in collectives.gather_texts(json.dumps(facts), world)]
    if not world.is_main:
        return None
    hosts = [facts for facts in gathered if facts["is_first"]]
    if len(hosts) == 1:
        return found
    of_all = [dataclasses.replace(Finding(**row), about=f"[{facts['host']}] {row['about']}")
              for facts in hosts for row in facts["findings"]]  # fmt: skip
    return [*of_all, network.clocks({facts["host"]: facts["time"] for facts in hosts})]


def _data(config: PretrainConfig) -> tuple[list[Finding], int | None]:
    """Whether the images are there that the run will need, and how many it trains on; None: they are not there."""
    num_images = None
    found = []
    try:
        images = find_training_images(config.data)
        num_images = len(images.paths)
        found.append(fine("data", f"{num_images:,} images in {config.data.root}"))
        if config.log.knn_every_epochs and images.classes:  # else RankMe alone is measured
            find_images(config.data.root, "val")
    except UserError as error:
        found.append(problem("data", str(error)))
    return found, num_images
