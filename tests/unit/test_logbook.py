"""log.jsonl and MLflow's journal, damaged in the middle: a log is a condition of nothing."""

import json

import pytest

from moco_dist.distributed.world import World
from moco_dist.run.logbook import Logbook, read_log
from moco_dist.tracking.outbox import Outbox
from tests.distributed.program import small_config

ROWS = [{"step": step, "loss": 1.0} for step in (2, 4, 6, 8)]
DAMAGE = {
    "zeros": b"\0" * 40, "half a line": b'{"step": 4, "lo', "a number": b"12", "null": b"null", "a list": b"[4]",
    "no step": b'{"loss": 1.0}', "no number": b'{"step": "four"}', "no text": b"\xff\xfe", "empty": b"",
    "deep": b"[" * 100_000,
}  # fmt: skip


def lines(*contents):
    return b"".join(content + b"\n" for content in contents)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_run_goes_on_and_is_read_over_a_damaged_line(tmp_path, damage):
    two, _, six, eight = (json.dumps(row).encode() for row in ROWS)
    log = tmp_path / "log.jsonl"
    log.write_bytes(lines(two, damage, six, damage, eight))
    assert [row["step"] for row in read_log(tmp_path)] == [2, 6, 8]
    logbook = Logbook(small_config(run={"dir": tmp_path}), World(), start=6, stop=10)
    assert log.read_bytes() == lines(two, damage, six)  # what comes after the step that the run goes on from is gone
    logbook.record({"step": 8})
    logbook.close()
    assert [row["step"] for row in read_log(tmp_path)] == [2, 6, 8]


class Remote:
    """Takes every record."""

    sent_bytes = 0

    def __init__(self):
        self.told = []

    def connect(self, begin):
        pass

    def deliver(self, records):
        self.told += records

    def mark_sent(self, sent_bytes):
        self.sent_bytes = sent_bytes


@pytest.mark.parametrize("kind", ["zeros", "half a line", "a number"])
def test_a_journal_is_sent_over_a_damaged_line(tmp_path, kind):
    path = tmp_path / "mlflow" / "pretrain.jsonl"
    path.parent.mkdir()
    path.write_bytes(lines(b'{"key": "a"}', DAMAGE[kind], b'{"step": 2}'))
    outbox = Outbox(path, remote := Remote(), print)
    assert list(outbox.records()) == [{"key": "a"}, {"step": 2}]
    while outbox.send_next():
        pass
    assert [record for record in remote.told if record] == [{"key": "a"}, {"step": 2}]
    assert outbox.unsent_bytes() == 0
    outbox.finish()
