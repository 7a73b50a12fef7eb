"""As much of the Kubernetes API as kubectl needs to create, list, log and delete what a launch makes.

Objects are checked by the APIs' schemas. A job's pods appear with it, labelled as the Job controller and JobSet's label
them. No defaults, no webhooks, nothing runs.
"""

import contextlib
import http.server
import json
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.launch.schemas import problems

RESOURCES = {
    "v1": [("services", "Service"), ("configmaps", "ConfigMap"), ("pods", "Pod"), ("secrets", "Secret"),
           ("persistentvolumeclaims", "PersistentVolumeClaim")],
    "kueue.x-k8s.io/v1beta1": [("localqueues", "LocalQueue")],
    "batch/v1": [("jobs", "Job")],
    "trainer.kubeflow.org/v1alpha1": [("trainjobs", "TrainJob"), ("trainingruntimes", "TrainingRuntime")],
}  # fmt: skip
PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?(?:/(?P<plural>[^/]+))?(?:/(?P<name>[^/]+))?(?P<log>/log)?"
)


@dataclass
class Cluster:
    """What the API holds, and how it misbehaves.

    Attributes:
        objects: by (plural, namespace, name).
        refused: plurals that nobody may create, or list.
        resources: what is served: take a group out for a cluster without its operator.
        late: how many times Trainer's webhook has not yet heard of a TrainJob's runtime.
        status: what every request is answered by, if not None.
    """

    port: int = 0
    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    resources: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: dict(RESOURCES))
    late: int = 0
    status: int | None = None

    def made(self) -> set[str]:
        """plural/name of what a launch makes, pods left out."""
        others = ("pods", "persistentvolumeclaims", "secrets", "localqueues")
        return {f"{plural}/{name}" for plural, _, name in self.objects if plural not in others}

    def add(self, plural: str, namespace: str, name: str) -> None:
        """What somebody has made before."""
        version, kind = next((v, kind) for v, kinds in RESOURCES.items() for p, kind in kinds if p == plural)
        metadata = {"name": name, "namespace": namespace, "uid": str(uuid.uuid4())}
        self.objects[plural, namespace, name] = {"apiVersion": version, "kind": kind, "metadata": metadata}

    def create(self, plural: str, namespace: str, thing: dict[str, Any], dry_run: bool) -> tuple[int, dict[str, Any]]:
        """The API's answer to a POST."""
        name = thing["metadata"]["name"]
        if plural in self.refused:
            return failure(403, "Forbidden", f'{plural} is forbidden: User "me" cannot create resource "{plural}"')
        if wrong := problems(thing):
            return failure(422, "Invalid", f'{thing["kind"]} "{name}" is invalid: {"; ".join(wrong)}')
        if (plural, namespace, name) in self.objects:
            return failure(409, "AlreadyExists", f'{plural} "{name}" already exists')
        if plural == "trainjobs" and self.late:
            self.late -= 1
            why = "specified trainingRuntime must be created before the TrainJob is created"
            return failure(403, "Forbidden", f'admission webhook "validator.trainjob" denied the request: {why}')
        thing["metadata"].update(uid=str(uuid.uuid4()), namespace=namespace, resourceVersion="1")
        if not dry_run:
            self.objects[plural, namespace, name] = thing
            self._make_pods(namespace, thing)
        return 201, thing

    def _make_pods(self, namespace: str, thing: dict[str, Any]) -> None:
        name, spec = thing["metadata"]["name"], thing.get("spec", {})
        if thing["kind"] == "Job":
            names, labels = [f"{name}-{i}" for i in range(spec["completions"])], spec["template"]["metadata"]["labels"]
        elif thing["kind"] == "TrainJob":
            names = [f"{name}-node-0-{i}" for i in range(spec["trainer"]["numNodes"])]
            labels = {"jobset.sigs.k8s.io/jobset-name": name}
        else:
            return
        for pod in names:
            self.objects["pods", namespace, pod] = {
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod, "namespace": namespace, "labels": labels},
                "spec": {"containers": [{"name": "node"}]}, "status": {"phase": "Running"},
            }  # fmt: skip

    def delete(self, key: tuple[str, str, str]) -> tuple[int, dict[str, Any]]:
        """The API's answer to a DELETE; a job takes its pods along."""
        gone = self.objects.pop(key)
        for pod in [k for k in self.objects if k[0] == "pods" and key[0].endswith("jobs") and k[2].startswith(key[2])]:
            del self.objects[pod]
        details = {"name": key[2], "kind": key[0], "uid": gone["metadata"]["uid"]}
        return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": details}

    def checks_fields(self, version: str) -> dict[str, Any]:
        """The part of the OpenAPI document by which kubectl knows that it need not look for unknown fields itself."""
        group, _, number = version.rpartition("/")
        paths = {
            f"/{plural}": {"patch": {
                "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
                "parameters": [{"name": "fieldValidation", "in": "query"}], "responses": {},
            }} for plural, kind in self.resources[version]
        }  # fmt: skip
        return {"openapi": "3.0.0", "info": {"title": "stub", "version": "1"}, "paths": paths}

    def answer(self, method: str, url: str, body: bytes) -> tuple[int, dict[str, Any] | str]:
        """Status and JSON, or text."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        if self.status is not None:
            return failure(self.status, "Unauthorized", "Unauthorized")
        if path == "/api":
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [{"groupVersion": g, "version": g.split("/")[1]} for g in self.resources if "/" in g]
            groups = [{"name": v["groupVersion"].split("/")[0], "versions": [v], "preferredVersion": v}
                      for v in versions]  # fmt: skip
            return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if path == "/openapi/v2":
            return 200, ""  # an empty document, in Protocol Buffers
        if path == "/openapi/v3":
            names = {f"{'apis' if '/' in version else 'api'}/{version}": version for version in self.resources}
            return 200, {"paths": {n: {"serverRelativeURL": f"/openapi/v3/of/{v}"} for n, v in names.items()}}
        if path.startswith("/openapi/v3/of/"):
            return 200, self.checks_fields(path.removeprefix("/openapi/v3/of/"))
        match = PATH.fullmatch(path)
        version = match and (match["core"] or match["group"])
        if not match or version not in self.resources:
            return failure(404, "NotFound", "the server could not find the requested resource")
        if not match["plural"]:
            verbs = ["create", "delete", "get", "list", "watch"]
            served = [{"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
                      for plural, kind in self.resources[version]]  # fmt: skip
            return 200, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": served}
        key = (match["plural"], match["namespace"], match["name"])
        if method == "POST":
            return self.create(key[0], key[1], json.loads(body), "dryRun" in query)
        if key[2] is None and key[0] in self.refused:
            return failure(403, "Forbidden", f'{key[0]} is forbidden: User "me" cannot list resource "{key[0]}"')
        if key[2] is None:
            wanted = dict(term.split("=") for term in ",".join(query.get("labelSelector", [])).split(",") if term)
            items = [thing for (plural, namespace, _), thing in self.objects.items() if (plural, namespace) == key[:2]
                     and wanted.items() <= thing["metadata"].get("labels", {}).items()]  # fmt: skip
            kind = dict(self.resources[version])[key[0]]
            return 200, {"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items}
        if key not in self.objects:
            return failure(404, "NotFound", f'{key[0]} "{key[2]}" not found')
        if match["log"]:
            return 200, f"step 1 of {key[2]}\n"
        return self.delete(key) if method == "DELETE" else (200, self.objects[key])


def failure(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    """The API's way to say no."""
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message,
                  "code": code}  # fmt: skip


@contextlib.contextmanager
def serving() -> Iterator[Cluster]:
    """An empty cluster at http://127.0.0.1:PORT."""
    cluster = Cluster()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = cluster.answer(self.command, self.path, body)
            is_text = isinstance(content, str)
            data = (content if is_text else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if is_text else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _handle

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on the tests' output."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    cluster.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield cluster
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
