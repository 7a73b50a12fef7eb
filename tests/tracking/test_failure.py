"""What is said of a failure of MLflow: the reason, whole, in one line, and the proxy that stands in between."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from moco_dist.errors import UserError
from moco_dist.tracking import client_of
from moco_dist.tracking.failure import reason
from moco_dist.tracking.server import require_usable

pytest.importorskip("mlflow")
PAGE = "<html><head><title>x</title></head><body><h1>502 Bad Gateway</h1><p>upstream is gone</p></body></html>"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)


@pytest.fixture
def refusing():
    """A server of this machine that answers each question with a page of its own."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(502)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def why(uri):
    with pytest.raises(Exception, match=".") as caught:
        client_of(uri).get_run("0" * 32)
    return reason(caught.value, uri)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://127.0.0.1:1", "it does not answer"),
        ("http://no-such-host.invalid", "it does not answer: n"),
    ],
)
def test_a_server_that_is_not_there(uri, expected):
    assert why(uri).startswith(expected)


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"])
def test_a_server_that_ends_in_the_middle_of_an_answer(begun):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            for _ in range(3):  # requests asks again by itself where nothing came
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(begun)

        threading.Thread(target=answer, daemon=True).start()
        assert why(f"http://127.0.0.1:{listening.getsockname()[1]}").startswith("it does not answer")


def test_something_else_that_answers(refusing):
    assert why(f"http://{refusing}") == "it answers 502 Bad Gateway"


@pytest.mark.parametrize("scheme", ["http://", ""])  # requests takes an address without one too
def test_a_proxy_is_named(refusing, monkeypatch, scheme):
    monkeypatch.setenv("HTTP_PROXY", f"{scheme}me:hunter2@{refusing}")
    for uri in ("http://127.0.0.1:1", "http://localhost:1"):
        said = why(uri)
        host = uri.split("/")[2].split(":")[0]
        assert f"(asked through the proxy http://{refusing} of HTTP_PROXY; NO_PROXY={host} leaves it out)" in said
        assert "hunter2" not in said
    monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
    assert why("http://127.0.0.1:1") == "it does not answer"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("API request to endpoint /x failed with error code 403 != 200. Response body: 'Permission denied'", None),
        ("Detected out-of-date schema (found a, not b). Take a backup, then run 'mlflow db upgrade <uri>'", None),
        (f"failed with error code 404 != 200. Response body: '{PAGE}'",
         "failed with error code 404 != 200. Response body: ' 502 Bad Gateway upstream is gone '"),
        ("(psycopg2.OperationalError) connection failed:\nFATAL:  password authentication failed for user \"u\"\n\n"
         "(Background on this error at: https://sqlalche.me/e/20/e3q8)",
         '(psycopg2.OperationalError) connection failed: FATAL: password authentication failed for user "u"'),
        ("(sqlite3.OperationalError) attempt to write a readonly database\n[SQL: INSERT INTO x\nVALUES (?)]\n"
         "[parameters: (1,)]", "(sqlite3.OperationalError) attempt to write a readonly database"),
        ("Max retries (Caused by SSLError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] no local issuer'))",
         "it does not answer: this machine does not trust its certificate; MLFLOW_TRACKING_SERVER_CERT_PATH names that "
         "of your own authority"),
        ("", "OSError"),
    ],
)  # fmt: skip
def test_the_reason_is_not_cut_off(text, expected):
    assert reason(OSError(text)) == (text if expected is None else expected)


def test_a_long_message_keeps_its_end():
    said = reason(OSError(f"it failed: {'x' * 5000} since the disk is full"))
    assert said.startswith("it failed: ")
    assert said.endswith(" since the disk is full")
    assert len(said) < 600


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"])
def test_a_token_with_a_line_break_is_named_and_not_shown(name, monkeypatch):
    monkeypatch.setenv(name, "tok3n-of-mine\n")
    with pytest.raises(UserError, match=f"^{name} has a line break") as caught:
        require_usable("http://host")
    assert "tok3n" not in str(caught.value)
    require_usable("sqlite:///x.db")
