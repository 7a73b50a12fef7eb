"""Where this process stands among the others, as a plain value."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from moco_dist.errors import UserError

# What starts processes without telling them their places as torchrun does, and the variable that says how many.
FOREIGN_STARTERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}


@dataclass(frozen=True)
class World:
    """One process's place. Every function of it can be tested for 64 ranks without starting one.

    Attributes:
        rank: of this process among all, 0 to world_size - 1.
        local_rank: of this process on its host.
        world_size: processes in all.
        local_world_size: processes on this host.
        device: `cpu` or `cuda:LOCAL_RANK`; `cuda:0` where each process sees its own GPU alone.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise UserError(
                f"rank {self.rank} of {self.world_size} (local {self.local_rank} of {self.local_world_size}) "
                "is not a place in a world; start with torchrun, or set all of RANK, WORLD_SIZE, LOCAL_RANK, "
                "LOCAL_WORLD_SIZE"
            )

    @property
    def num_nodes(self) -> int:
        """Hosts, each with local_world_size processes."""
        return self.world_size // self.local_world_size

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes files and talks to people."""
        return self.rank == 0


def world_from_env(device: str = "auto", env: Mapping[str, str] = os.environ) -> World:
    """The World that torchrun (or any launcher that sets its variables) describes; a world of one without them.

    Args:
        device: `auto` (CUDA where there is a GPU), `cpu` or `cuda`.
        env: the environment to read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from (LOCAL_SIZE from
            DeepSpeed's launcher).

    Raises:
        UserError: a variable is not a number, there is no GPU for this rank, or srun or MPI has started several
            processes that know nothing of each other.
    """
    if "WORLD_SIZE" not in env:
        for starter, variable in FOREIGN_STARTERS.items():
            if env.get(variable, "1") not in ("", "0", "1"):
                raise UserError(
                    f"{starter} has started {env[variable]} processes, each of which would be a run of its own; start "
                    "one torchrun on each host: `moco-dist launch slurm CONFIG.yaml --dry-run` shows how"
                )

    def number(name: str, default: int) -> int:
        text = env.get(name, str(default))
        if not text.isdecimal():
            raise UserError(f"environment variable {name} is {text!r}; a number is expected")
        return int(text)

    local_rank = number("LOCAL_RANK", 0)
    world_size = number("WORLD_SIZE", 1)
    if device != "cpu":
        import torch  # here, since a World is a plain value: what needs no more than values answers without torch

        device = "cuda" if device == "cuda" or torch.cuda.is_available() else "cpu"
    if device == "cuda":
        found = torch.cuda.device_count()
        index = 0 if each_sees_its_own_gpu(env) else local_rank
        if index >= found:
            raise UserError(
                f"local rank {local_rank} has no GPU: {found} found; "
                + (f"start {found} process(es) per host, or use device cpu" if found else "use device cpu or auto")
            )
        device = f"cuda:{index}"
    return World(
        rank=number("RANK", 0),
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", world_size)),
        device=device,
    )


def each_sees_its_own_gpu(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the processes of this host see one GPU each, as under `srun --gpus-per-task=1`.

    torchrun's processes share their environment, so all of them see the same: one GPU for several is a mistake there.
    """
    import torch

    has_others = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env.get("WORLD_SIZE", "1"))) != "1"
    return has_others and "TORCHELASTIC_RUN_ID" not in env and torch.cuda.device_count() == 1
