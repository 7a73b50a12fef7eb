"""A server that answers as stores and web servers do on bad days, in a process of its own, on a free port.

The first part of a path is how it answers: a refusal of `REFUSALS`, or a way of giving an object. `azure` is an account
of Azure's, whose only container is `set`.
"""

import contextlib
import subprocess
import sys

REFUSALS = {  # bucket: status and code of the answer
    "forbidden": (403, "AccessDenied"), "unknown": (403, "InvalidAccessKeyId"),
    "unsigned": (403, "SignatureDoesNotMatch"), "expired": (400, "ExpiredToken"), "moved": (301, "PermanentRedirect"),
    "region": (400, "AuthorizationHeaderMalformed"),
}  # fmt: skip

_SERVER = """
import hashlib, re, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder, refusals = Path(sys.argv[1]), eval(sys.argv[2])

class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        with (folder / "asked").open("a") as file:
            file.write(f"{self.command} {self.path} {self.headers.get('Range', '')}\\n")

    def refused(self, status, code):
        text = f"<Error><Code>{code}</Code><Message>{self.headers.get('Authorization')}: expecting 'eu-north-1'" \\
               "</Message></Error>"
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def listed(self):
        blobs = [
            f"<Blob><Name>{file.name}</Name><Properties><Content-Length>{file.stat().st_size}</Content-Length>"
            f"<Last-Modified>{self.date_time_string(int(file.stat().st_mtime))}</Last-Modified>"
            "<Content-Type>application/x-tar</Content-Type>"
            f"<Etag>{hashlib.md5(file.read_bytes()).hexdigest()}</Etag></Properties></Blob>"  # as Azure: no quotes
            for file in folder.glob("*.tar")
        ]
        text = f"<EnumerationResults><Blobs>{''.join(blobs)}</Blobs><NextMarker /></EnumerationResults>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        how, _, name = path.strip("/").partition("/")
        if how in refusals:
            return self.refused(*refusals[how])
        if how == "azure":
            container, _, name = name.partition("/")
            if container != "set":
                return self.refused(404, "ContainerNotFound")
            if "comp=list" in query:
                return self.listed()
        if not (folder / name).is_file():
            return self.refused(404, "NoSuchKey")
        content = (folder / name).read_bytes()
        start, end, status = 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\\d+)-(\\d+)", self.headers.get("Range", ""))
        if asked and how != "whole":
            start, end, status = int(asked[1]), min(int(asked[2]) + 1, end), 206
        tag = '"' + hashlib.md5(content).hexdigest() + '"'
        if how not in ("careless", "untagged") and self.headers.get("If-Match", tag) != tag:
            return self.refused(412, "PreconditionFailed")
        self.send_response(status)
        if how != "untagged":
            self.send_header("ETag", tag)
        self.send_header("Last-Modified", self.date_time_string(int((folder / name).stat().st_mtime)))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[start:end]
        failing = (folder / "fails").exists()
        if how == "trickles" and failing:
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.3)
        elif how in ("stops", "stalls") and failing:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(1000 if how == "stalls" else 0)
            self.close_connection = True
        else:
            self.wfile.write(body)

    do_HEAD = do_GET

server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def answering(folder):
    """The server's address over HTTP, for the length of a `with`; it gives the files of `folder`.

    Where there is a file `fails` in it, `trickles` gives a few bytes a second, and `stops` and `stalls` half of a body.
    What was asked for is in the file `asked`.
    """
    words = [sys.executable, "-c", _SERVER, str(folder), repr(REFUSALS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()
