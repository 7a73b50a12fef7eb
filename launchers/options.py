"""Where a command can be started, and the options of each place."""

from launchers import kubernetes, slurm
from launchers.hosts import LocalOptions, TorchrunOptions

OPTIONS = {
    "local": LocalOptions,
    "torchrun": TorchrunOptions,
    "slurm": slurm.SlurmOptions,
    "kubernetes": kubernetes.KubernetesOptions,
}
