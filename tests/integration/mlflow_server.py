"""A real `mlflow server` for the length of a test."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

START_TRIES = 240  # half a second each


class Server:
    """`mlflow server` on a free port of this machine, its artifacts and, without a URI, its database in `folder`."""

    def __init__(self, folder, backend_uri=None):
        self.folder, self.backend_uri = folder, backend_uri or f"sqlite:///{folder / 'server.db'}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_BACKEND_STORE_URI": self.backend_uri,  # not a flag: it may have a password
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, start_new_session=True
            )
        for _ in range(START_TRIES):
            if self._answers():
                return
            try:
                self.process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
            break
        self.stop()
        pytest.fail(f"mlflow server did not start:\n{(self.folder / 'server.log').read_text()}")

    def kill(self):
        """As a crash."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def stop(self):
        """End the server and its workers: it is the leader of a process group of its own."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
        self.process = None

    def _answers(self):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False
