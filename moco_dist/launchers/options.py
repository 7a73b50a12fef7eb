"""Where a command can be started, and the options of each place."""

from moco_dist.launchers import kubernetes, slurm
from moco_dist.launchers.hosts import LocalOptions, TorchrunOptions

OPTIONS = {
    "local": LocalOptions,
    "torchrun": TorchrunOptions,
    "slurm": slurm.SlurmOptions,
    "kubernetes": kubernetes.KubernetesOptions,
}
