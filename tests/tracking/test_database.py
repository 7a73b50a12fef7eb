"""A sqlite database that several processes set up, or that such a set-up has broken."""

import contextlib
import shutil
import sqlite3

import pytest

from moco_dist.cli.main import main
from moco_dist.distributed.world import World
from moco_dist.tracking import Tracker, client_of
from tests.tracking.conftest import NUM_FIRST
from tests.tracking.records import config_of, history_of, run_of

pytest.importorskip("mlflow")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's own
    pytest.mark.filterwarnings("ignore:Unnamed CHECK constraint:UserWarning"),  # alembic's
]
OLD_REVISION = "451aebb31d03"  # of MLflow 0.9, the first one


def break_(path, keeps_runs):
    """What a set-up leaves that was killed, or that two processes did at once."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE _alembic_tmp_experiments (experiment_id INTEGER)")
        database.execute("UPDATE alembic_version SET version_num = ?", (OLD_REVISION,))
        database.execute("DROP TABLE spans")  # or MLflow does not look
        if not keeps_runs:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                database.execute(f"DELETE FROM {table}")
            database.execute("DELETE FROM experiments WHERE experiment_id != 0")


def track(run_dir):
    with Tracker.for_pretraining(config_of(run_dir), World()) as tracker:
        tracker.log_metrics(1, {"loss": 3.0})


def test_runs_that_start_together_share_a_new_database(first_runs):
    folder, _ = first_runs
    for i in range(NUM_FIRST):
        assert run_of(folder / f"run{i}").info.status == "FINISHED"
        assert history_of(folder / f"run{i}", "loss") == [(1, 1.0)]


def test_a_broken_database_without_runs_is_made_anew(runs, capsys):
    break_(runs / "mlflow.db", keeps_runs=False)
    track(runs / "a")
    assert history_of(runs / "a", "loss") == [(1, 3.0)]
    assert "has no runs, so it is renamed to mlflow.db.broken" in capsys.readouterr().err
    assert sorted(path.name for path in runs.iterdir()) == ["a", "mlflow.db", "mlflow.db.broken"]


@pytest.mark.parametrize("how", ["half made", "not a database", "damaged"])
def test_a_broken_database_with_runs_is_named_with_the_way_out(runs, empty_database, how, capsys):
    """It stays as it is; what is proposed works, and brings the whole journal."""
    track(runs / "a")
    runs = runs.rename(runs.with_name("elsewhere"))  # where this process has not opened it yet
    database = runs / "mlflow.db"
    if how == "half made":
        break_(database, keeps_runs=True)
    elif how == "not a database":
        database.write_text("what somebody put there")
    else:
        database.write_bytes(database.read_bytes()[:100_000])
    before = database.read_bytes()
    assert main(["sync", str(runs / "a")]) in (0, 69)
    track(runs / "b")
    error = capsys.readouterr().err
    assert f"move it away (mv {database} {database}.broken), then `moco-dist sync RUN` for each run" in error
    if how == "not a database":
        assert database.read_bytes() == before

    database.rename(runs / "mlflow.db.broken")
    shutil.copy(empty_database, database)  # as MLflow would make it, in seconds
    for name in "ab":
        assert main(["sync", str(runs / name)]) == 0
        assert history_of(runs / name, "loss") == [(1, 3.0)]


def test_no_other_database_is_set_aside(runs):
    """Of a newer MLflow: a mistake of the installation, and MLflow says so."""
    with contextlib.closing(sqlite3.connect(runs / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(Exception, match=r"out-of-date database schema|Can't locate revision"):
        client_of(f"sqlite:///{runs / 'mlflow.db'}")
    assert [path.name for path in runs.iterdir()] == ["mlflow.db"]
