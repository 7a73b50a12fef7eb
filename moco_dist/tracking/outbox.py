"""A journal of what one MLflow run is to be told, and the thread that tells it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moco_dist.files import LineFile, read_record
from moco_dist.tracking.failure import reason
from moco_dist.tracking.remote import Refused, RemoteRun

FINISH_SECONDS = 30  # the longest wait at the end for what is on its way
BATCH_METRICS = 900  # MLflow takes 1,000 at once
LONGEST_PAUSE_SECONDS = 60.0

Record = dict[str, Any]


class Outbox:
    """RUN/mlflow/NAME.jsonl: one record a line, sent in order by a thread of its own.

    The remote run's file says how much of it was sent. A record that was sent just before a crash is sent again, which
    changes nothing the second time (metrics have their time, which MLflow compares).
    """

    def __init__(self, path: Path, remote: RemoteRun, say: Callable[[str], None]) -> None:
        self.path, self.remote, self._say = path, remote, say
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = LineFile(path)
        self.is_busy = not self._lines.is_locked  # another process sends it
        self._news, self._is_closing, self._is_failing, self._is_full = threading.Condition(), False, False, False
        self._thread: threading.Thread | None = None

    def records(self) -> Iterator[Record]:
        """All records, sent or not, in order; damaged lines are left out."""
        with self.path.open("rb") as file:
            found = (read_record(line) for line in file if line.endswith(b"\n"))
            yield from (record for record in found if record is not None)

    def put(self, record: Record) -> None:
        """Add a record, from any thread; returns at once."""
        with self._news:
            problem = self._lines.append(json.dumps(record))
            was_full, self._is_full = self._is_full, bool(problem)
            self._news.notify()
        if problem and not was_full:
            self._say(f"{self.path} cannot be written: {problem}; going on, and trying again with the next line")

    def start(self) -> None:
        """Begin to send."""
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._thread.start()

    def finish(self, timeout_seconds: float = FINISH_SECONDS) -> bool:
        """Wait for what is on its way; returns whether all was sent. A server that fails now is not waited for."""
        with self._news:
            self._is_closing = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        self._lines.close()
        return self.unsent_bytes() == 0

    def unsent_bytes(self) -> int:
        """How much of the journal the server does not have."""
        return self.path.stat().st_size - self.remote.sent_bytes

    def send_next(self) -> bool:
        """Send the next records, if there are any; returns whether there were.

        Raises:
            Exception: of mlflow, requests or SQLAlchemy; the same records are the next ones again.
        """
        self.remote.connect(next(self.records(), {}))
        start = self.remote.sent_bytes
        batch, ends = [], []
        for record, end in self._batch(start):
            batch.append(record)
            ends.append(end)
        if not batch:
            return False
        try:
            self.remote.deliver(batch)
        except Refused:  # one record is refused for good: the others shall not wait for it
            for record, end in zip(batch, ends, strict=True):
                try:
                    self.remote.deliver([record])
                except Refused as refusal:
                    self._say(f"left out, since MLflow refuses it: {refusal}")
                self.remote.mark_sent(end)
        self.remote.mark_sent(ends[-1])
        return True

    def _batch(self, start: int) -> Iterator[tuple[Record, int]]:
        """The next records and where each ends in the file."""
        num_metrics = 0
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                record = read_record(line) or {}  # a damaged line: nothing to tell
                num_metrics += len(record.get("metrics", ()))
                start += len(line)
                yield record, start
                if num_metrics > BATCH_METRICS - 100:
                    return

    def _send_all(self) -> None:
        """The thread's work. A failure is told once an outage; while the outage lasts, pauses grow to a minute."""
        pause = 1.0
        while True:
            closing = self._is_closing
            try:
                while self.send_next():
                    pass
                pause = 1.0
                if self._is_failing:
                    self._say("answers again; all that it has missed was delivered")
                self._is_failing = False
                if closing:
                    return
                self._wait_for_news()
            except Exception as error:  # mlflow, SQLAlchemy and requests each have their own
                if not self._is_failing:
                    self._say(f"{reason(error, self.remote.uri)}; going on, and keeping what it misses in {self.path}")
                self._is_failing = True
                if closing:
                    return
                self._wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            finally:
                if closing:
                    self.remote.close()

    def _wait_for_news(self) -> None:
        with self._news:
            self._news.wait_for(lambda: self._is_closing or self.unsent_bytes() > 0, timeout=LONGEST_PAUSE_SECONDS)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._news:
            self._news.wait_for(lambda: self._is_closing, timeout=until - time.monotonic())
