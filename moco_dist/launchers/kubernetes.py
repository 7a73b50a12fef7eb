"""Kubernetes: a manifest of everything that a run needs, without its two volume claims, and the manifest's creation."""

import re
import subprocess
import time
from pathlib import PurePosixPath
from typing import Literal

import yaml

from moco_dist.config.address import Url
from moco_dist.config.evaluate import LinearConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.section import setting
from moco_dist.config.source import flatten
from moco_dist.errors import EXIT_IN_USE, EXIT_MISTAKE, EXIT_PREEMPTED, UnreachableError, UserError, nearest
from moco_dist.launchers.job import Hosts, Job, refuse_credentials
from moco_dist.launchers.render import render

DATA, RUNS = "/data", "/runs"  # where the claims are, in a container
CONFIG = "/etc/moco-dist/config.yaml"
RUNTIME_SECONDS = 10  # until Trainer's webhook has heard of a runtime that was made just before its TrainJob
CACHE_MARGIN, CACHE_MARGIN_MIB = 1.05, 64  # beyond data.cache_bytes: Kubernetes ends a pod whose volume has more
SHM_GIB_PER_GPU = 2  # 8 loaders, two prefetched batches each, of 32 samples with two views of 224 px: 0.2 GB; x 10

# What kubectl says where the cluster's server does not answer.
NO_SERVER = re.compile(
    r"connection refused|was refused|i/o timeout|no such host|handshake timeout|no route to host|deadline exceeded"
    r"|unable to connect|service unavailable", re.IGNORECASE
)  # fmt: skip


class KubernetesOptions(Hosts):
    """`moco-dist launch kubernetes`: what a pod is made of."""

    image: str = setting(..., "container image, built from the Dockerfile", changes="place", min_length=1)
    form: Literal["trainjob", "indexed-job"] = setting(
        "trainjob", "trainjob: Kubeflow Trainer v2; indexed-job: Kubernetes alone, no operator", changes="place"
    )
    namespace: str = setting(
        "default", "of all that is made", changes="place", pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
    )
    queue: str | None = setting(None, "Kueue's local queue; default: none", changes="place")
    data_claim: str = setting(
        "data", f"PersistentVolumeClaim seen as {DATA}, read only; not used where data.root is at an address",
        changes="place", min_length=1,
    )  # fmt: skip
    runs_claim: str = setting(
        "runs", f"PersistentVolumeClaim seen as {RUNS}; several pods write to it", changes="place", min_length=1
    )
    data_secret: str | None = setting(
        None, "Secret with the credentials of an object store, as its environment variables; default: none",
        changes="place",
    )  # fmt: skip
    mlflow_secret: str | None = setting(
        None,
        "Secret with MLFLOW_TRACKING_URI, and MLFLOW_TRACKING_USERNAME and _PASSWORD; default: none",
        changes="place",
    )
    cpus_per_gpu: int | None = setting(
        None, "CPU cores for each rank; default: its loader processes and one", changes="place", gt=0
    )
    memory_gib_per_gpu: int = setting(
        16, "host memory for each rank, shared memory included", changes="place", unit="GiB", gt=2
    )


def manifest(job: Job, config: PretrainConfig | LinearConfig, options: KubernetesOptions) -> str:
    """The manifest of a pre-training or of a linear evaluation, as YAML.

    Raises:
        UserError: a path that no volume has, or a password that everybody could read.
    """
    if problems := _problems(config):
        raise UserError("\n".join(problems))
    values = flatten(config)
    refuse_credentials(
        [f"--{name}={value}" for name, value in values.items() if isinstance(value, str)],
        "a ConfigMap; give --mlflow-secret NAME instead, a Secret with MLFLOW_TRACKING_URI",
    )
    size = job.size
    cpus_per_gpu = options.cpus_per_gpu or job.cpus_per_gpu
    return render(
        f"{options.form.replace('-', '_')}.yaml",
        title=f"moco-dist {job.words[0]} on {size.nodes} pod(s) x {size.ranks_per_node} "
        f"{'GPU' if size.gpus_per_node else 'CPU'} rank(s)",
        plain=options.form == "indexed-job",
        name=job.name,
        size=size,
        args=["python", "-m", "moco_dist.launchers.torchrun", "-m", "moco_dist", job.words[0], CONFIG],
        config_yaml=yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False).rstrip("\n"),
        cpus_per_node=cpus_per_gpu * size.ranks_per_node,
        memory_gib=options.memory_gib_per_gpu * size.ranks_per_node,
        shm_gib=SHM_GIB_PER_GPU * size.ranks_per_node,
        mistake=EXIT_MISTAKE,
        in_use=EXIT_IN_USE,
        preempted=EXIT_PREEMPTED,
        secrets=[name for name in (options.mlflow_secret, options.data_secret) if name],
        data_claim=_data_claim(config, options),
        cache_dir=_cache_dir(config),
        cache_mib=CACHE_MARGIN_MIB + int(CACHE_MARGIN * (config.data.cache_bytes or 0)) // 2**20,
        **options.model_dump(include={"namespace", "image", "queue", "runs_claim"}),
    )


def _data_claim(config: PretrainConfig | LinearConfig, options: KubernetesOptions) -> str | None:
    return None if isinstance(config.data.root, Url) else options.data_claim


def _cache_dir(config: PretrainConfig | LinearConfig) -> PurePosixPath | None:
    folder = config.data.cache_dir
    return PurePosixPath(folder) if folder is not None and isinstance(config.data.root, Url) else None


def _problems(config: PretrainConfig | LinearConfig) -> list[str]:
    problems = []
    is_pretraining = isinstance(config, PretrainConfig)
    run = ("run.dir", config.run.dir, RUNS) if is_pretraining else ("run-dir", config.run_dir, RUNS)
    for name, path, volume in (("data.root", config.data.root, DATA), run):
        if path is None or isinstance(path, Url):  # it is the pre-training's, or no path
            continue
        inside = PurePosixPath(path.as_posix())
        if ".." in inside.parts or not inside.is_relative_to(volume) or str(inside) == RUNS:
            problems.append(
                f"{name} {path} is not in {volume}, where the claim is in a container; --{name} {volume}/{path.name} is"
            )
    if (cache := _cache_dir(config)) is not None:
        if not cache.is_absolute() or ".." in cache.parts or cache.is_relative_to(RUNS) or len(cache.parts) < 2:
            problems.append(f"data.cache_dir {cache} is to be a disk of each pod's node: --data.cache-dir /cache is")
        if config.data.cache_bytes is None:
            problems.append("data.cache_dir would fill a node's disk, and Kubernetes ends pods on it then: "
                            "--data.cache-bytes says how much it may take")  # fmt: skip
    return problems


def require_what_pods_wait_for(config: PretrainConfig | LinearConfig, options: KubernetesOptions) -> None:
    """Ask the cluster for the claims, the secret and the queue: without them pods wait for ever, and say nothing.

    What the user may not list is taken to be there.

    Raises:
        UserError: one is missing, or kubectl is.
    """
    wanted = {
        "persistentvolumeclaim": [name for name in (_data_claim(config, options), options.runs_claim) if name],
        "secret": [options.mlflow_secret, options.data_secret],
        "localqueue.kueue.x-k8s.io": [options.queue],
    }
    problems = []
    for kind, names in wanted.items():
        if not any(names):
            continue
        done = _kubectl("get", kind, "--namespace", options.namespace, "--output", "name")
        if "doesn't have a resource type" in done.stderr:
            problems.append(f"{kind} {names[0]}: the cluster has nothing of this kind")
        if done.returncode:
            continue
        there = [line.rpartition("/")[2] for line in done.stdout.split()]
        problems += [
            f"{kind} {name} is not in namespace {options.namespace}, where {', '.join(there) or 'none'} is"
            f"{nearest(name, there)}"
            for name in names if name and name not in there
        ]  # fmt: skip
    if problems:
        raise UserError("\n".join(problems))


def submit(job: Job, text: str, options: KubernetesOptions) -> list[str]:
    """Give the manifest to the cluster that kubectl is set up for; if it refuses a part, the rest is taken back.

    There is no dry run by the server first: Trainer's webhook refuses a TrainJob whose runtime is not there.

    Returns:
        what to tell the user.

    Raises:
        UserError: kubectl or the cluster refuses.
    """
    done = _create(text)
    created = done.stdout.split()
    for _ in range(RUNTIME_SECONDS):
        if "must be created before the TrainJob" not in done.stderr:
            break
        time.sleep(1)
        done = _create(text.rpartition("\n---\n")[2])  # the TrainJob alone
        created += done.stdout.split()
    if done.returncode:
        if created:
            _kubectl("delete", "--namespace", options.namespace, "--ignore-not-found", *created)
        kind = UnreachableError if NO_SERVER.search(done.stderr) else UserError
        raise kind(f"kubectl: {_reason(done.stderr, job, options)}")
    return [*(f"created {name}" for name in created), *how_to(job, options)]


def is_there(job: Job, options: KubernetesOptions) -> bool:
    """Whether the cluster has the job, running or ended."""
    kind = "trainjob" if options.form == "trainjob" else "job"
    return _kubectl("get", "--namespace", options.namespace, f"{kind}/{job.name}").returncode == 0


def _create(text: str) -> subprocess.CompletedProcess[str]:
    return _kubectl("create", "--output", "name", "--filename", "-", input=text)


def _kubectl(*words: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["kubectl", *words], input=input, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("kubectl is not here; install it, or take the manifest of --dry-run") from error


def _reason(errors: str, job: Job, options: KubernetesOptions) -> str:
    """What kubectl said, as one line, and what to do about it where that is known."""
    if "AlreadyExists" in errors:
        return (f"{job.name} already exists in namespace {options.namespace}; stop it first: {_stop(job, options)}; "
                "or give --run.dir another last part")  # fmt: skip
    if "no matches for kind" in errors:
        return "Kubeflow Trainer is not on this cluster; --form indexed-job needs no operator"
    if "failed to download openapi" in errors:
        reason = errors.partition("failed to download openapi: ")[2].partition("; if you choose")[0]
        return f"cannot talk to the cluster: {reason}"
    return " ".join(errors.replace('error when creating "STDIN": ', "").split())


def how_to(job: Job, options: KubernetesOptions) -> list[str]:
    """How to follow, stop and resume a run."""
    label = f"app={job.name}"
    if options.form == "trainjob":
        label = f"jobset.sigs.k8s.io/jobset-name={job.name}"
    follow = f"kubectl logs --namespace {options.namespace} --follow --prefix --max-log-requests {job.size.nodes}"
    return [
        f"follow:  {follow} --selector {label}",
        f"stop:    {_stop(job, options)}    (it saves first)",
        f"resume:  the same command again, after `stop`; it goes on from the newest checkpoint in {job.run_dir}",
    ]


def _stop(job: Job, options: KubernetesOptions) -> str:
    kinds = ("trainjob", "trainingruntime") if options.form == "trainjob" else ("job", "service")
    parts = " ".join(f"{kind}/{job.name}" for kind in kinds)
    return f"kubectl delete --namespace {options.namespace} {parts} configmap/{job.name}-config"
