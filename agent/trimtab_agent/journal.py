"""The agent's durable memory: one SQLite file with the command journal, jobs and outbox, behind one writer thread.

SQLite (WAL, synchronous=FULL) rather than an append-only file: commands are looked up by key, turns by subject, entries expire,
and a job's end must enter journal and outbox at once; an own file format would grow all of that by hand.
The writer thread commits everything that waits as one transaction, so that commands at the same time share one fsync, and no
caller (least of all the heartbeat) ever waits for the disk unless it asks for a result.

A disk that is full or broken makes every waiting call `Unavailable("journal-not-writable")`: nothing is done that was not
written before. Several simulated hosts may share a file; each has its own `agent_id`.
"""

import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import structlog

from trimtab_protos.errors import Internal, Unavailable

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

_BATCH = 256
_CLOSE_TIMEOUT_S = 10.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS agent (
  agent_id TEXT PRIMARY KEY, incarnation TEXT NOT NULL, boot_id TEXT NOT NULL, is_rebuilt INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS subject (
  agent_id TEXT NOT NULL, subject_id TEXT NOT NULL, turn INTEGER NOT NULL, epoch INTEGER NOT NULL, touched_at_ms INTEGER NOT NULL,
  PRIMARY KEY (agent_id, subject_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS command (
  agent_id TEXT NOT NULL, operation_id TEXT NOT NULL, step TEXT NOT NULL, direction TEXT NOT NULL,
  request_hash BLOB NOT NULL, incarnation TEXT NOT NULL, turn INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('begun', 'answered', 'failed')), answer BLOB NOT NULL, at_ms INTEGER NOT NULL,
  PRIMARY KEY (agent_id, operation_id, step, direction)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS command_by_age ON command (at_ms);
CREATE TABLE IF NOT EXISTS job (
  agent_id TEXT NOT NULL, operation_id TEXT NOT NULL, step TEXT NOT NULL, direction TEXT NOT NULL,
  subject_id TEXT NOT NULL, turn INTEGER NOT NULL, epoch INTEGER NOT NULL, incarnation TEXT NOT NULL,
  kind TEXT NOT NULL, request BLOB NOT NULL, state TEXT NOT NULL, is_cancel_asked INTEGER NOT NULL, was_told INTEGER NOT NULL,
  sequence INTEGER NOT NULL, outcome BLOB NOT NULL, at_ms INTEGER NOT NULL,
  PRIMARY KEY (agent_id, operation_id, step, direction)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS job_by_state ON job (agent_id, state, at_ms);
CREATE TABLE IF NOT EXISTS outbox (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT, agent_id TEXT NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS outbox_by_agent ON outbox (agent_id, sequence);
CREATE TABLE IF NOT EXISTS given (
  agent_id TEXT PRIMARY KEY, lease_number INTEGER NOT NULL, database_mark INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""


class JournalFile:
    """One SQLite file; thread-safe. `":memory:"` for simulated hosts whose journal need not outlive the process."""

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._queue: queue.SimpleQueue[tuple[Work[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="journal", daemon=True)
        self._thread.start()
        opened.result()

    def submit(self, work: Work[T]) -> Future[T]:
        """Run `work` in the writer's next transaction; the future is done only after the commit.

        An exception of `work` rolls back what it wrote and reaches the future. `work` must be short and must not wait.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                future.set_exception(Unavailable("journal-closed", "the agent is stopping"))
            else:
                self._queue.put((work, future))
        return future

    def close(self) -> None:
        """Commit what was submitted and close the file."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self, opened: Future[None]) -> None:
        try:
            connection = self._open()
        except sqlite3.OperationalError as error:
            opened.set_exception(Unavailable("journal-not-writable", f"the journal {self.path} cannot be opened: {error}"))
            return
        except sqlite3.DatabaseError as error:
            opened.set_exception(Internal("journal-damaged", f"the journal {self.path} is damaged: {error}"))
            return
        opened.set_result(None)
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            is_open = None not in batch
            # From here on a future cannot be cancelled any more; those that were are not run.
            wanted = [entry for entry in batch if entry is not None and entry[1].set_running_or_notify_cancel()]
            if wanted:
                _commit(connection, wanted)
        connection.close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30.0)
        connection.execute("PRAGMA journal_mode=WAL")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        connection.execute("PRAGMA synchronous=FULL")
        connection.executescript(_SCHEMA)
        return connection


def open_or_replace(path: Path) -> JournalFile:
    """Open the journal; a damaged one is put aside and begun anew, which makes a new incarnation.

    Refusing to start instead would leave guests that nobody may stop or move, for a memory that the domains' metadata can rebuild.
    """
    try:
        return JournalFile(path)
    except Internal as error:
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        structlog.get_logger(__name__).error("journal put aside", error=error.message, kept_as=str(aside))
        path.replace(aside)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return JournalFile(path)


def _commit(connection: sqlite3.Connection, batch: list[tuple[Work[Any], Future[Any]]]) -> None:
    outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for work, future in batch:
            result, failure = _run_one(connection, work)
            outcomes.append((future, result, failure))
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        _roll_back(connection)
        structlog.get_logger(__name__).error("journal not writable", error=str(error), lost=len(batch))
        for _work, future in batch:
            future.set_exception(Unavailable("journal-not-writable", f"the agent's journal cannot be written: {error}"))
        return
    for future, result, failure in outcomes:
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)


def _run_one(connection: sqlite3.Connection, work: Work[Any]) -> tuple[Any, BaseException | None]:
    connection.execute("SAVEPOINT work")
    try:
        result = work(connection)
    except sqlite3.Error:
        raise  # the disk's fault: nobody of this batch may believe that something was written
    except Exception as error:  # noqa: BLE001 belongs to the caller, who gets it through the future
        connection.execute("ROLLBACK TO work")
        connection.execute("RELEASE work")
        return None, error
    connection.execute("RELEASE work")
    return result, None


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")
