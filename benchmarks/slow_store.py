"""Stores that are some milliseconds away: moto's S3 server or nginx, and before it a proxy that holds back every byte.

All are processes of their own on this machine, and so take a share of its cores from what is measured.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BUCKET = "set"

_SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

_PROXY = r"""
import asyncio, os, sys

port, seconds, requests, counted = int(sys.argv[1]), float(sys.argv[2]), 0, os.open(sys.argv[3], os.O_WRONLY)

async def forward(reader, writer, is_request=False):
    global requests
    loop, waiting = asyncio.get_running_loop(), asyncio.Queue()

    async def send():
        while True:
            due, data = await waiting.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                writer.close()
                return
            writer.write(data)

    sender = asyncio.create_task(send())
    try:
        while data := await reader.read(2**18):
            if is_request and b" HTTP/1.1\r\n" in data:
                requests += 1
                os.pwrite(counted, str(requests).encode(), 0)
            waiting.put_nowait((loop.time() + seconds, data))
    except ConnectionError:
        pass
    waiting.put_nowait((loop.time() + seconds, b""))
    await sender

async def accepted(reader, writer):
    store_reader, store_writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.gather(forward(reader, store_writer, True), forward(store_reader, writer))

async def main():
    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

_NGINX = """
daemon off; master_process off; error_log stderr; pid {folder}/pid;
events {{}}
http {{
    access_log off; sendfile on; keepalive_requests 1000000;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class SlowStore(NamedTuple):
    """The store.

    Attributes:
        url: its address over HTTP.
        direct_url: the same without the delay.
        counted: a file with the number of requests that came by `url`.
    """

    url: str
    direct_url: str
    counted: Path

    def requests(self) -> int:
        """How many have come."""
        return int(self.counted.read_text() or 0)

    def upload(self, folder: Path, place: str) -> None:
        """Put all files below `folder` into the bucket, so that everybody may read them."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                _put(f"{self.direct_url}/{BUCKET}/{place}/{path.relative_to(folder)}", path.read_bytes())


@contextlib.contextmanager
def slow_store(delay_seconds: float) -> Iterator[SlowStore]:
    """The store, for the length of a `with`; an answer comes at least `delay_seconds` after its request.

    It has a bucket called BUCKET, and this process's environment says where it is, and has credentials.
    """
    with contextlib.ExitStack() as open_ones, tempfile.NamedTemporaryFile() as counted:
        direct = _port_of(open_ones, _SERVER)
        port = _port_of(open_ones, _PROXY, str(direct), str(delay_seconds / 2), counted.name)
        url = f"http://127.0.0.1:{port}"
        os.environ.update(AWS_ENDPOINT_URL=url, AWS_REGION="us-east-1", AWS_ACCESS_KEY_ID="benchmark",
                          AWS_SECRET_ACCESS_KEY="benchmark")  # fmt: skip
        store = SlowStore(url, f"http://127.0.0.1:{direct}", Path(counted.name))
        _put(f"{store.direct_url}/{BUCKET}", b"")
        yield store


@contextlib.contextmanager
def slow_web_server(root: Path, delay_seconds: float) -> Iterator[str | None]:
    """The address of nginx over the files of `root`, for the length of a `with`; None where it is not installed."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        yield None
        return
    with contextlib.ExitStack() as open_ones:
        folder = Path(open_ones.enter_context(tempfile.TemporaryDirectory()))
        with socket.create_server(("127.0.0.1", 0)) as free:
            direct = free.getsockname()[1]
        config, counted = folder / "nginx.conf", folder / "requests"
        config.write_text(_NGINX.format(folder=folder, port=direct, root=root))
        counted.touch()
        server = open_ones.enter_context(
            subprocess.Popen([program, "-p", str(folder), "-c", str(config)], stderr=subprocess.DEVNULL)
        )
        open_ones.callback(server.kill)
        port = _port_of(open_ones, _PROXY, str(direct), str(delay_seconds / 2), str(counted))
        yield f"http://127.0.0.1:{port}"


def _port_of(open_ones: contextlib.ExitStack, program: str, *words: str) -> int:
    server = subprocess.Popen([sys.executable, "-c", program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    open_ones.enter_context(server)
    open_ones.callback(server.kill)
    assert server.stdout is not None
    return int(server.stdout.readline())


def _put(url: str, content: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream", "x-amz-acl": "public-read"}
    urllib.request.urlopen(urllib.request.Request(url, content, headers, method="PUT"), timeout=60).close()
