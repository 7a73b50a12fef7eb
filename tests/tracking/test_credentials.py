"""Passwords and tokens: whatever is printed or written goes without them, and nothing else changes."""

import logging
import os
import subprocess
import sys
import traceback

import pytest

from moco_dist.config.credentials import redacted_output, without_credentials

TOKEN = "tok3n-first-part\nsecond-part"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://u:p@ss@host:5000/x", "http://host:5000/x"),
        ("API request to https://u:p@host/api failed", "API request to https://host/api failed"),
        ("https://t0ken@host/x", "https://host/x"),
        ("postgresql+psycopg2://u:p@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("postgresql+psycopg2://u:p/ss@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("postgresql://u:12/34@db/mlflow", "postgresql://db/mlflow"),
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("postgresql://db/x?user=u&password=p&sslmode=require", "postgresql://db/x?user=u&password=&sslmode=require"),
        ("https://host/?token=abc", "https://host/?token="),
        ("https://host/x?a=1&access_token=abc#b", "https://host/x?a=1&access_token=#b"),
        ("https://host/#id_token=abc", "https://host/#id_token="),
        (
            "https://s3/x?X-Amz-Credential=a&X-Amz-Signature=b&X-Amz-Security-Token=c&v=1",
            "https://s3/x?X-Amz-Credential=&X-Amz-Signature=&X-Amz-Security-Token=&v=1",
        ),
        ("https://blob/x?sv=1&sig=abc%3D&se=2", "https://blob/x?sv=1&sig=&se=2"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dp", "mssql+pyodbc:///?odbc_connect="),
        ("DRIVER={x};UID=u;PWD=p;DATABASE=d", "DRIVER={x};UID=u;PWD=;DATABASE=d"),
        ("host=db password='a b' user=u", "host=db password=*** user=u"),
        ('{"user": "u", "password": "a b"}', '{"user": "u", "password": ***}'),
        ("{'Authorization': 'Basic dTpw'}", "{'Authorization': 'Basic ***'}"),
        ("header value: 'Bearer abcdef0123'", "header value: 'Bearer ***'"),
        # Nothing of these is secret.
        ("sqlite:////a@b/mlflow.db", "sqlite:////a@b/mlflow.db"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("https://host/?page_token_size=3&keys=4", "https://host/?page_token_size=3&keys=4"),
        ("automountServiceAccountToken: false", "automountServiceAccountToken: false"),
        ("password authentication failed; basic authentication is asked for", None),
        ("export MLFLOW_TRACKING_PASSWORD=...  MLFLOW_TRACKING_TOKEN", None),
        ("step 1234/2000  loss 6.1  lr 0.03", None),
    ],
)
def test_forms(text, expected):
    assert without_credentials(text) == (text if expected is None else expected)


@pytest.mark.parametrize("text", [f"Bearer {TOKEN}", f"value: {TOKEN!r}", f"b'{TOKEN.splitlines()[0]}", "second-part"])
def test_what_the_environment_keeps_is_left_out_by_lines_too(text, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    said = without_credentials(text)
    assert "tok3n" not in said
    assert "second" not in said


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN",
     "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_STORAGE_CONNECTION_STRING", "HF_TOKEN",
     "PGPASSWORD", "GOOGLE_SERVICE_ACCOUNT_KEY", "MLFLOW_FLASK_SERVER_SECRET_KEY", "MYSQL_PWD", "SLURM_JWT",
     "databricks_token"],
)  # fmt: skip
def test_what_is_secret_in_the_environment_is_known_by_its_name(name, monkeypatch):
    monkeypatch.setenv(name, "c0nf1dential")
    assert without_credentials("the store said: c0nf1dential is no key") == "the store said: *** is no key"


@pytest.mark.parametrize(
    "name", ["PWD", "OLDPWD", "KEYBOARD", "MLFLOW_TRACKING_USERNAME", "AWS_WEB_IDENTITY_TOKEN_FILE"]
)
def test_what_is_no_secret_in_the_environment_is_shown(name, monkeypatch):
    monkeypatch.setenv(name, "/srv/shared")
    assert without_credentials("in /srv/shared/runs") == "in /srv/shared/runs"


TRACEBACK = """
import sys
from moco_dist.cli import main as command
def fail(argv):
    raise RuntimeError("GET http://someone:hunter2@host:5000/api, PGPASSWORD c0nf1dential")
command._dispatch = fail
sys.exit(command.main([]))
"""


def test_a_traceback_that_the_interpreter_prints_goes_through_too():
    """Of a world of one, where nobody catches what nobody has foreseen."""
    environment = {**os.environ, "PGPASSWORD": "c0nf1dential"}
    words = [sys.executable, "-c", TRACEBACK]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "RuntimeError: GET http://host:5000/api, PGPASSWORD ***" in done.stderr
    assert "someone" not in done.stderr


def test_whatever_a_library_prints_goes_through(capsys, monkeypatch):
    """By print, by logging, by writelines, and in a traceback; before and after, streams are what they were."""
    streams = sys.stdout, sys.stderr
    uri = "http://someone:hunter2@host:5000"
    with redacted_output():
        print("View run at:", uri)
        sys.stdout.writelines([f"{uri}\n"])
        handler = logging.StreamHandler()
        logging.getLogger("some.library").addHandler(handler)
        logging.getLogger("some.library").error("cannot reach %s", uri)
        logging.getLogger("some.library").removeHandler(handler)
        try:
            raise OSError(uri)
        except OSError:
            traceback.print_exc()
    assert (sys.stdout, sys.stderr) == streams
    printed = "".join(capsys.readouterr())
    assert printed.count("http://host:5000") >= 4
    assert "hunter2" not in printed
    assert "someone" not in printed
