"""What a run needs of a machine: memory, file limits, disk, cores, packages, GPUs."""

import contextlib
import importlib.util
import os
import resource
import shutil
from pathlib import Path

from moco_dist.config.address import Url
from moco_dist.config.architectures import blocks_in, missing_start
from moco_dist.config.loading import worker_count
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.remote.cache import kept_bytes
from moco_dist.doctor.finding import Finding, fine, problem, warning
from moco_dist.run.folder import RunFolder
from moco_dist.run.size import checkpoint_bytes

MEMORY = Path("/proc/meminfo")
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
OTHER_GPUS = (Path("/dev/kfd"), Path("/dev/dxg"))  # AMD's, and those of a Linux in Windows
FILES_A_WORKER = 3  # its socket, its end, and the batch that it hands over; beside the batches that it has made
FILES_A_RANK = 4  # rank 0's connections to it: two meshes of gloo, and the two of the store that rank 0 holds
FILES_BESIDE = 256  # libraries, the log
INSTALL = {  # package: modules, how to get it
    "dali": ("nvidia.dali", "pip install 'moco_dist[dali]' (CUDA 13 or no GPU), nvidia-dali-cuda120 for CUDA 12"),
    "deepspeed": ("deepspeed", "pip install 'moco_dist[deepspeed]'"),
    "mlflow": ("mlflow", "pip install mlflow, or --tracking.backend none"),
    "psycopg2": ("psycopg2", "pip install psycopg2-binary"),
}


def check(config: PretrainConfig, ranks_per_host: int, world_size: int) -> list[Finding]:
    """What this host has for so many ranks on it, and in all; `packages`, which a run cannot do without, are apart."""
    return [
        memory(config, ranks_per_host, config.optim.global_batch_size // world_size),
        open_files(config, ranks_per_host, world_size),
        cores(config, ranks_per_host),
        gpus(config, ranks_per_host),
        *precision(config.optim.precision, config.run.device),
        disk(config, world_size),
        *cache(config),
    ]


def memory(config: PretrainConfig, ranks: int, local_batch: int) -> Finding:
    """Loader processes hold batches ahead of the step, in memory of their own that no /dev/shm limits.

    Each has as many as it is ahead, and one that is used; while the next one is waited for, the last one is kept too.
    """
    free = _free_memory()
    workers = worker_count(config.data.num_workers, ranks)
    if free is None or config.data.loader == "dali":
        return fine("memory", "not known here")
    views = 2 * local_batch * 3 * config.data.image_size**2
    needed = ranks * (max(1, workers) * (config.data.prefetch_batches + 1) + 1) * views
    text = f"{free / 2**20:,.0f} MiB free, loaders may fill {needed / 2**20:,.0f} MiB"
    if free < needed:
        return problem("memory", f"{text}: fewer data.num_workers or data.prefetch_batches")
    return fine("memory", text)


def _free_memory() -> int | None:
    """Bytes that may still be used, of the host or by its container's limit; None: not known."""
    try:
        rows = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        found = [int(rows["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        return None
    for path in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            found.append(int(path.read_text()))
    return min(found)


def open_files(config: PretrainConfig, ranks: int, world_size: int) -> Finding:
    """What rank 0 needs: connections to the other ranks, its workers' sockets, and the memory of their batches.

    A run raises the soft limit to the hard one by itself.
    """
    workers = worker_count(config.data.num_workers, ranks)
    needed = FILES_BESIDE + workers * (FILES_A_WORKER + config.data.prefetch_batches + 1)
    if world_size > 1:
        needed += world_size * FILES_A_RANK
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        return problem("open files", f"a process may open {hard}, and about {needed} are needed: a hard limit "
                       f"(ulimit -Hn) of {max(4096, needed)}, which only root may raise")  # fmt: skip
    most = "any number" if hard == resource.RLIM_INFINITY else hard
    return fine("open files", f"a process may open {most}, about {needed} are needed")


def cores(config: PretrainConfig, ranks: int) -> Finding:
    """Each rank and each of its workers wants a core."""
    workers = worker_count(config.data.num_workers, ranks)
    have, wanted = len(os.sched_getaffinity(0)), ranks * (workers + 1)
    if wanted > have:
        return warning("cores", f"{ranks} rank(s) with {workers} workers want {wanted}, here are "
                       f"{have}: --data.num-workers {max(0, have // ranks - 1)}")  # fmt: skip
    return fine("cores", f"{have} for {ranks} rank(s) with {workers} workers")


def start(config: PretrainConfig) -> list[Finding]:
    """Whether the weights that a new run begins with are there; rank 0 alone reads them."""
    init, has_begun = config.model.init, any(RunFolder(config.run.dir).checkpoints.glob("step_*"))
    if init is None or has_begun or not (missing := missing_start(init)):
        return []
    return [problem("model.init", missing)]


def packages(config: PretrainConfig) -> list[Finding]:
    """Whether the optional packages that this config asks for are there."""
    wanted = ["dali"] if config.data.loader == "dali" else []
    wanted += ["deepspeed"] if config.engine.kind == "deepspeed" else []
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if config.tracking.backend == "mlflow":
        wanted += ["mlflow"] + (["psycopg2"] if uri.startswith("postgresql") else [])
    found = []
    for name in wanted:
        module, how = INSTALL[name]
        if _is_missing(module):
            found.append(problem(name, f"not installed: {how}"))
    return found or [fine("packages", "all that this config asks for are installed")]


def _is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # the package around it is missing
        return True


def num_gpus() -> int:
    """Those that torch can use here. Where no GPU can be, torch is not imported to ask: that takes seconds."""
    if not _has_nvidia_driver() and not any(device.exists() for device in OTHER_GPUS):
        return 0
    import torch

    return torch.cuda.device_count()


def _has_nvidia_driver() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def gpus(config: PretrainConfig, ranks: int) -> Finding:
    """One a rank, and a PyTorch that can use them."""
    if config.run.device == "cpu":
        return fine("GPUs", "run.device is cpu")
    if num_gpus() == 0:
        if _has_nvidia_driver():
            import torch

            why = "built without CUDA" if torch.version.cuda is None else f"of CUDA {torch.version.cuda}"
            return problem("GPUs", f"there is an NVIDIA driver, and torch {torch.__version__} ({why}) cannot use it: "
                           "install the wheel for the driver's CUDA version, or update the driver")  # fmt: skip
        level = "error" if config.run.device == "cuda" else "warning"
        small = (blocks_in(config.model.arch) or 99) <= 8 and config.data.image_size <= 64
        if small and level == "warning":
            return fine("GPUs", "none; a CPU trains this small network")
        network = f"{config.model.arch} at {config.data.image_size} px"
        return Finding(level, "GPUs", f"none, and {network} is much work for a CPU; configs/demo.yaml is for CPUs")
    import torch

    from moco_dist.distributed.world import each_sees_its_own_gpu

    count = num_gpus()
    name = f"{count} x {torch.cuda.get_device_name()}"
    if count < ranks and not each_sees_its_own_gpu():
        return problem("GPUs", f"{count} for {ranks} ranks: start {count} processes a host")
    return fine("GPUs", name if count >= ranks else f"{name} for each rank")


def cache(config: PretrainConfig) -> list[Finding]:
    """Room in data.cache_dir. A run goes on without one, so nothing about it is an error."""
    wanted, most = config.data.cache_dir, config.data.cache_bytes
    if wanted is None:
        return []
    if not isinstance(config.data.root, Url):
        return [warning("cache", "data.cache_dir is not used: data.root is no address")]
    folder = _existing(wanted)
    if not os.access(folder, os.W_OK):
        return [warning("cache", f"{wanted} cannot be written, so nothing is kept: another --data.cache-dir")]
    free, kept = shutil.disk_usage(folder).free, kept_bytes(wanted)
    text = f"{wanted} has {free / 1e9:,.1f} GB free, and holds {kept / 1e9:,.1f} GB"
    if most is not None and most > kept + free:
        return [warning("cache", f"{text}, less than data.cache_bytes ({most / 1e9:,.1f} GB): what does not fit is "
                        "fetched in every epoch")]  # fmt: skip
    return [fine("cache", text)]


def precision(name: str, device: str) -> list[Finding]:
    """Whether this host computes fast in the precision that was asked for, by its name in `optim.precision`."""
    if name != "fp16" or (device != "cpu" and num_gpus()):
        return []
    return [warning("precision", "fp16 on a CPU is many times slower than fp32 and saves nothing: take fp32")]


def disk(config: PretrainConfig, world_size: int) -> Finding:
    """Room for the checkpoints that are kept, and the one being written."""
    folder = _existing(config.run.dir)
    if not os.access(folder, os.W_OK):
        return problem("run folder", f"{config.run.dir} cannot be written: another --run.dir")
    needed = checkpoint_bytes(config, world_size) * (config.checkpoint.keep_last + 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        return problem("disk", f"{folder} has {free / 1e9:,.1f} GB free, checkpoints take {needed / 1e9:,.1f} GB: "
                       "another --run.dir, or fewer checkpoint.keep_last")  # fmt: skip
    return fine("disk", f"{free / 1e9:,.1f} GB free, checkpoints take {needed / 1e9:,.1f} GB")


def _existing(path: Path) -> Path:
    """The nearest folder on the way to `path` that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
