"""The pods of a manifest, one a machine: their own args, environment, volumes and read-only root, run as written.

What a kubelet does: PID 1 of the image's entry point, no capabilities, SIGTERM and then SIGKILL after the grace period.
What a controller does: environment variables of Kubeflow's Trainer. Not there: images, limits, scheduling, users (this
machine's Python may be root's alone).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml
from dockerfile_parse import DockerfileParser

from tests.launch.machines import Machines

# The root: this machine's files, read only; what runs the program is seen even where a volume lies over its folder.
CONTAINER = """
set -e
scratch=$1; shift
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$scratch/upper,workdir=$scratch/work" "$scratch/root"
root=$scratch/root
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind /etc/hosts "$root/etc/hosts"
while [ "$1" != -- ]; do
    mkdir -p "$root/$2"
    if [ "$1" = tmpfs ]; then mount -t tmpfs tmpfs "$root/$2"; else mount --bind "$1" "$root/$2"; fi
    [ "$3" = ro ] && mount -o remount,bind,ro "$root/$2"
    shift 3
done
shift
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


class Pods:
    """Pods of an Indexed Job, or of a TrainJob with its runtime.

    Args:
        manifest: the text.
        volumes: folder of this machine for each claim.
        folder: for logs, and the mounted config.
    """

    def __init__(self, manifest: str, volumes: dict[str, Path], folder: Path) -> None:
        self.folder, self.volumes = folder, volumes
        by_kind = {document["kind"]: document for document in yaml.safe_load_all(manifest)}
        self.config = by_kind["ConfigMap"]
        self.variables: dict[str, str] = {}
        if "TrainJob" in by_kind:
            self._read_train_job(by_kind["TrainJob"], by_kind["TrainingRuntime"])
        else:
            self._read_job(by_kind["Job"], by_kind["Service"])
        self.machines: Machines | None = None
        self.started = 0

    def _read_job(self, job: dict[str, Any], service: dict[str, Any]) -> None:
        name, template = job["metadata"]["name"], job["spec"]["template"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert template["spec"]["subdomain"] == service["metadata"]["name"]
        assert job["spec"]["completionMode"] == "Indexed"
        self.job_spec, self.pod = job["spec"], template["spec"]
        self.names = [f"{name}-{i}" for i in range(job["spec"]["completions"])]
        self.aliases = {pod: [f"{pod}.{name}"] for pod in self.names}

    def _read_train_job(self, job: dict[str, Any], runtime: dict[str, Any]) -> None:
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
        assert runtime["spec"]["mlPolicy"]["torch"] == {}
        self.job_spec = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
        self.pod = self.job_spec["template"]["spec"]
        self.pod["containers"][0].update({key: trainer[key] for key in ("image", "args")})
        self.names = [f"{name}-node-0-{i}" for i in range(trainer["numNodes"])]
        self.aliases = {pod: [f"{pod}.{name}"] for pod in self.names}
        self.variables = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
            "PET_MASTER_PORT": "29400",
        }

    def start(self, index: int) -> subprocess.Popen:
        """Start pod `index`, or its replacement; its output goes to `log(index)`."""
        assert self.machines
        container = self.pod["containers"][0]
        assert "command" not in container
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), **self._environment(container, index)}
        self.started += 1
        scratch = self.folder / f"scratch{self.started}"
        scratch.mkdir()
        python = Path(sys.prefix)
        program = [(str(path), str(path), "ro") for path in (Path.cwd(), python.resolve())]
        mounts = [*self._mounts(container), *program]
        words = [word for mount in mounts for word in mount]
        entry_point = yaml.safe_load(_instruction("ENTRYPOINT"))
        args = [str(python / "bin" / "python") if word == "python" else word for word in container["args"]]
        entry_point[0] = shutil.which(entry_point[0])
        command = ["unshare", "--mount", "--pid", "--fork", "bash", "-c", CONTAINER, "pod", str(scratch), *words, "--",
                   *entry_point, *args]  # fmt: skip
        return self.machines.start(self.names[index], command, self.log(index), env=environment)

    def log(self, index: int) -> Path:
        """Output of pod `index` and of those that it replaced."""
        return self.folder / f"pod{index}.log"

    def evict(self, pod: subprocess.Popen) -> int:
        """As a node that is drained does it; returns the exit status."""
        first = next(p for p in psutil.Process(pod.pid).children(recursive=True) if p.name() == "tini")
        first.terminate()
        try:
            return pod.wait(self.pod["terminationGracePeriodSeconds"])
        except subprocess.TimeoutExpired:
            first.kill()
            raise

    def action(self, exit_status: int) -> str:
        """What the Job does about a pod that ended so, by podFailurePolicy."""
        for rule in self.job_spec["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if codes and codes["operator"] == "In" and exit_status in codes["values"]:
                assert codes["containerName"] == self.pod["containers"][0]["name"]
                return rule["action"]
        return "Count"

    def _environment(self, container: dict[str, Any], index: int) -> dict[str, str]:
        own = {"PET_NODE_RANK": str(index), **self.variables} if self.variables else {}
        for variable in container["env"]:
            if "value" in variable:
                own[variable["name"]] = variable["value"]
            else:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
                own[variable["name"]] = str(index)
        return own

    def _mounts(self, container: dict[str, Any]) -> list[tuple[str, str, str]]:
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        mounts = []
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "emptyDir" in volume:
                source = "tmpfs"
            elif "configMap" in volume:
                assert volume["configMap"]["name"] == self.config["metadata"]["name"]
                source = str(self.folder / "config_map")
                Path(source).mkdir(exist_ok=True)
                for name, text in self.config["data"].items():
                    Path(source, name).write_text(text)
            else:
                source = str(self.volumes[volume["persistentVolumeClaim"]["claimName"]])
            mounts.append((source, mount["mountPath"], "ro" if mount.get("readOnly") else "rw"))
        return sorted(mounts, key=lambda mount: mount[1])


def _instruction(name: str) -> str:
    """The value of the last instruction `name` of the Dockerfile."""
    with Path("Dockerfile").open("rb") as file:
        lines = DockerfileParser(fileobj=file).structure
    return [line["value"] for line in lines if line["instruction"] == name][-1]
