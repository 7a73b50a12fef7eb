"""A real HTTP server of S3's protocol (moto) for tests, in a process of its own, on a free port of this machine."""

import contextlib
import multiprocessing
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
import torch

_SERVER = """
import itertools, os, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

away, fails_every = sys.argv[1], int(sys.argv[2])
application, counted = DomainDispatcherApplication(create_backend_app), itertools.count(1)

def answer(environ, start_response):
    is_asked = environ["REQUEST_METHOD"] in ("GET", "HEAD")
    if is_asked and (os.path.exists(away) or fails_every and next(counted) % fails_every == 0):
        start_response("503 Service Unavailable", [("Content-Length", "0")])
        return []
    return application(environ, start_response)

server = make_server("127.0.0.1", 0, answer, threaded=True)
print(server.port, flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()  # until the test is done, or gone
"""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests", "AWS_REGION": "us-east-1",
}  # fmt: skip


class Store:
    """The server; `url` is its address over HTTP, and `environment` what lets obstore find it.

    As long as there is a file `away`, it answers nobody who asks for something.
    """

    def __init__(self, port, away):
        self.port, self.url, self.away = port, f"http://127.0.0.1:{port}", away
        self.environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    def put(self, place, content=b""):
        """Make a bucket, or an object in one that everybody may read."""
        headers = {"Content-Type": "application/octet-stream", "x-amz-acl": "public-read"}
        request = urllib.request.Request(f"{self.url}/{place}", content, headers, method="PUT")
        urllib.request.urlopen(request, timeout=20).close()

    def delete(self, place):
        """Remove an object."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{place}", method="DELETE"), timeout=20).close()

    def put_folder(self, folder, place):
        """All files below `folder`."""
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                self.put(f"{place}/{path.relative_to(folder)}", path.read_bytes())


@contextlib.contextmanager
def running_store(fails_every=0):
    """A Store, for the length of a `with`; each request of such a number fails, where that is not 0."""
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
        [sys.executable, "-c", _SERVER, f"{folder}/away", str(fails_every)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as server:  # fmt: skip
        try:
            yield Store(int(server.stdout.readline()), Path(folder) / "away")
        finally:
            server.kill()


@contextlib.contextmanager
def store_of_this_process():
    """The same, which this process and its children find by their environment."""
    with running_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


def in_a_child(work):
    """What `work()` returns in a process of its own: this one forks others, and so may not use obstore itself."""

    def send():
        torch.set_num_threads(1)  # a child has none of its parent's threads
        there.send(work())

    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=send)
    child.start()
    assert here.poll(120)
    child.join()
    return here.recv()
