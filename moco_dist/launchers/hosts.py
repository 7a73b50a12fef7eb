"""Hosts without a scheduler: torchrun on this machine, or on each of several."""

from moco_dist.config.section import setting
from moco_dist.errors import UserError
from moco_dist.launchers.job import Hosts, Job

DEFAULT_PORT = 29500


class LocalOptions(Hosts):
    """`moco-dist launch local`: this machine."""


class TorchrunOptions(Hosts):
    """`moco-dist launch torchrun`: the same command on every host."""

    head: str = setting("localhost", "the host where all meet, as HOST or HOST:PORT", changes="place")


def torchrun_words(job: Job, options: Hosts) -> list[str]:
    """What `python -m moco_dist.launchers.torchrun`, or torchrun itself, is given on every host.

    Raises:
        UserError: several hosts without a place to meet.
    """
    words = ["--nnodes", str(job.size.nodes), "--nproc-per-node", str(job.size.ranks_per_node)]
    if job.size.nodes == 1:
        words.append("--standalone")
    elif isinstance(options, TorchrunOptions) and options.head != "localhost":
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint(options.head), "--rdzv-id", job.name]
    elif isinstance(options, TorchrunOptions):
        raise UserError(f"{job.size.nodes} nodes need --head HOST[:PORT]: one of them, by the name all others know")
    else:
        raise UserError(f"launch local is one machine; for {job.size.nodes} nodes: launch torchrun, slurm, kubernetes")
    return [*words, "-m", "moco_dist", *job.words]


def endpoint(head: str) -> str:
    """HOST or HOST:PORT with a port; an IPv6 address has its own colons, and may stand in brackets."""
    if head.count(":") > 1 and not head.startswith("["):
        head = f"[{head}]"
    return f"{head}:{DEFAULT_PORT}" if ":" not in head or head.endswith("]") else head
