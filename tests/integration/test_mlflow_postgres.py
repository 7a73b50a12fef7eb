"""A team's MLflow: a real server on a real PostgreSQL, and two pre-trainings that use it at once."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from moco_dist.cli.main import main
from tests.faults.processes import wait_for_step
from tests.integration.mlflow_server import Server

pytest.importorskip("mlflow")
psycopg2 = pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install psycopg2-binary")
pytestmark = pytest.mark.slow

ACCOUNT = "postgres"  # of the operating system: PostgreSQL does not run as root
PASSWORD = "hunter2"
NUM_STEPS = 200


def _programs() -> Path:
    """The folder of the newest PostgreSQL; Debian keeps `initdb` and `pg_ctl` out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        pytest.skip("PostgreSQL's initdb is not installed: apt-get install postgresql")
    return found[-1].parent if found else Path(str(on_path)).resolve().parent


def _account() -> dict:
    """What `subprocess` needs to run PostgreSQL."""
    if os.geteuid() != 0:
        return {}
    try:
        entry = pwd.getpwnam(ACCOUNT)
    except KeyError:
        pytest.skip(f"PostgreSQL does not run as root, and there is no user {ACCOUNT}")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@pytest.fixture
def database():
    """The URI of an empty database, with a password, on a free port of this machine."""
    programs, account = _programs(), _account()
    # Not in tmp_path: pytest lets no other user into it.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        if account:
            for path in (folder, folder / "password"):
                os.chown(path, account["user"], account["group"])

        def run(program, *words):
            # Output to a file: the server keeps what it is given open, and a pipe would never end.
            with (folder / f"{program}.log").open("a+") as log:
                command = [str(programs / program), "-D", str(folder / "data"), *words]
                done = subprocess.run(command, cwd=folder, stdout=log, stderr=log, timeout=120, **account)
                log.seek(0)
                assert done.returncode == 0, log.read()

        run("initdb", "--username", "mlflow", "--pwfile", str(folder / "password"), "--auth", "scram-sha-256",
            "--encoding", "UTF8", "--no-locale", "--no-sync")  # fmt: skip
        run("pg_ctl", "start", "--wait", "-o", f"-p {port} -h 127.0.0.1 -k {folder} -F")
        try:
            yield f"postgresql+psycopg2://mlflow:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "--wait", "--mode", "immediate")


@pytest.fixture
def server(database, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder, database)
    server.start()
    yield server
    server.stop()


def test_two_runs_at_once_on_postgresql(server, tmp_path, start):
    """Each has a run of its own with all of its log, settings and page, in one experiment that both wanted to make."""
    from mlflow import MlflowClient

    run_dirs = [tmp_path / "runs" / name for name in ("first", "second")]
    flags = ["--tracking.backend", "mlflow", "--tracking.uri", server.uri, "--tracking.experiment", "team",
             "--run.stop-at-step", str(NUM_STEPS)]  # fmt: skip
    both = [start(run_dir, *flags, "--run.seed", str(seed), ranks=1) for seed, run_dir in enumerate(run_dirs)]
    for process, run_dir in zip(both, run_dirs, strict=True):
        wait_for_step(process, run_dir, 2)
    assert [process.poll() for process in both] == [None, None]
    for process, run_dir in zip(both, run_dirs, strict=True):
        output = process.communicate()[0]
        assert process.returncode == 0, output
        if "moco-dist sync" in output:  # a slow machine: the server had not taken all of it half a minute later
            assert main(["sync", str(run_dir)]) == 0
        assert main(["report", str(run_dir)]) == 0

    client, run_ids = MlflowClient(server.uri), []
    for seed, run_dir in enumerate(run_dirs):
        saved = json.loads((run_dir / "mlflow.json").read_text())
        run = client.get_run(saved["run_id"])
        run_ids.append(run.info.run_id)
        assert (run.info.run_name, run.info.status) == (run_dir.name, "FINISHED")
        assert (run.data.params["run.seed"], run.data.params["model.arch"]) == (str(seed), "resnet10")

        rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(2, NUM_STEPS + 1, 2))
        names = {name for row in rows for name in row} - {"step"}
        assert {name for name in run.data.metrics if not name.startswith("system/")} == names
        for name in names:
            history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            assert history == [(row["step"], row[name]) for row in rows if name in row]

        # The page went through the server, which alone knows where it lies.
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        copies = tmp_path / f"copies of {run_dir.name}"
        copies.mkdir()
        copy = client.download_artifacts(run.info.run_id, "report/index.html", str(copies))
        assert Path(copy).read_bytes() == (run_dir / "report" / "index.html").read_bytes()
        (kept,) = (server.folder / "artifacts").rglob(f"{run.info.run_id}/artifacts/report/index.html")
        assert kept.is_file()

    assert run_ids[0] != run_ids[1]
    assert _runs_in(server.backend_uri) == {(run_id, "team") for run_id in run_ids}


def _runs_in(uri: str) -> set[tuple[str, str]]:
    """Ids and experiments of all runs, asked of the database itself."""
    connection = psycopg2.connect(uri.replace("+psycopg2", ""))
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT run_uuid, experiments.name FROM runs JOIN experiments USING (experiment_id)")
            return set(cursor.fetchall())
    finally:
        connection.close()
