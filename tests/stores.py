"""A real HTTP server of S3's protocol (moto) for tests, in a process of its own, on a free port of this machine."""

import contextlib
import subprocess
import sys
import urllib.request

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test is done, or gone
"""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests", "AWS_REGION": "us-east-1",
}  # fmt: skip


class Store:
    """The server; `url` is its address over HTTP, and `environment` what lets obstore find it."""

    def __init__(self, port):
        self.port, self.url = port, f"http://127.0.0.1:{port}"
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
def running_store():
    """A Store, for the length of a `with`."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        try:
            yield Store(int(server.stdout.readline()))
        finally:
            server.kill()
