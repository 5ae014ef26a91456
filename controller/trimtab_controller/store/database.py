"""Opens the database and runs transactions, for threads (`Database`) and for the event loop (`AsyncDatabase`).

The same store functions serve both.

A transaction is a function of a `Session`. It is given as a function, not as a `with` block, so that it can be run again when
PostgreSQL reports a deadlock or a serialization failure: store and service functions therefore do SQL and nothing else.

SQLite (WAL): writes take BEGIN IMMEDIATE, since a deferred transaction that upgrades from read to write fails at once instead
of waiting; those of one process share commits (`group_commit`). PostgreSQL groups the commits of its connections by itself.
`durable` writes fsync before they return (synchronous=FULL; on PostgreSQL synchronous_commit=on); the others (lease beats,
progress, observations) survive a crash of the process, not of the machine.

Rejected: drivers for asyncio. A read of six statements cost 5.4 ms of CPU through aiosqlite (one hop between threads for each
statement) and 1.0 ms in one thread; through psycopg's async driver 6.4 ms against 3.8 ms.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from trimtab_controller.store import disk_reserve, kept
from trimtab_controller.store.ballast_table import DISK_FULL, TableReserve
from trimtab_controller.store.disk_reserve import DiskReserve
from trimtab_controller.store.group_commit import CommitThread, GroupCommit, Piece
from trimtab_controller.store.kept import KeptConnections
from trimtab_controller.store.lean import Statements
from trimtab_protos.errors import Unavailable

T = TypeVar("T")

__all__ = ["AsyncDatabase", "Database", "Session", "migration_engine"]

TRIES = 4
# Connections beyond the pool's size, for a moment.
OVERFLOW = 4
# PostgreSQL: serialization_failure, deadlock_detected, lock_not_available, and idle_in_transaction_session_timeout: a process that
# was frozen inside a transaction, which the server ended.
RETRIED_SQLSTATES = frozenset({"40001", "40P01", "55P03", "25P03"})
# What a transaction fails with. The second: a part of it is to be undone after its connection was lost, and with it the whole.
Failure: TypeAlias = DBAPIError | PendingRollbackError
FAILURES = (DBAPIError, PendingRollbackError)
UNAVAILABLE = "the controller's database does not answer; retry later"
# Classes of errors that are the server's and not the statement's: connection, resources, operator intervention.
UNAVAILABLE_SQLSTATE_CLASSES = frozenset({"08", "53", "57"})
# disk_full, out_of_memory, too_many_connections; SQLite says "database or disk is full".
FULL_SQLSTATES = frozenset({DISK_FULL})

_WRITE = "trimtab_write"
_DURABLE = "trimtab_durable"


def _configure(engine: Engine) -> None:
    """Attach the listeners that make a driver behave as the module says."""
    if engine.dialect.name == "sqlite":
        kept.configure(engine)
    else:
        sa.event.listen(engine, "begin", _postgres_begin)


def _postgres_begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if not options.get(_WRITE):
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
    elif not options.get(_DURABLE, True):
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def _read_json(document: str | bytes) -> Any:
    """Return the value of a JSON column. Most documents of a row are empty, and the parser takes its time for those, too."""
    if len(document) == 2:
        if document in ("{}", b"{}"):
            return {}
        if document in ("[]", b"[]"):
            return []
    return json.loads(document)


def _connect_arguments(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"timeout": kept.BUSY_TIMEOUT_MS / 1000}
    # A frozen process must not hold row locks for longer than a leader's successor may wait.
    return {
        "connect_timeout": 5,
        # A path to the server that swallows everything is noticed within seconds, not after the quarter of an hour of TCP's own
        # patience: whoever waits for it holds a right that others wait to see ended.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "options": "-c idle_in_transaction_session_timeout=3000 -c lock_timeout=10000 -c statement_timeout=30000",
    }


def _is_retried(error: Failure) -> bool:
    if isinstance(error, PendingRollbackError):
        return True
    state = getattr(error.orig, "sqlstate", None)
    return state in RETRIED_SQLSTATES or (isinstance(error, OperationalError) and "database is locked" in str(error.orig))


def _is_full(error: Failure) -> bool:
    if isinstance(error, PendingRollbackError):
        return False
    return getattr(error.orig, "sqlstate", None) in FULL_SQLSTATES or "disk is full" in str(error.orig)


def _translate(error: Failure) -> Exception:
    """Return what callers see: an integrity error is theirs to interpret, everything else means "not now"."""
    if isinstance(error, PendingRollbackError):
        return Unavailable("database-unavailable", UNAVAILABLE)
    if isinstance(error, IntegrityError):
        return error
    state = getattr(error.orig, "sqlstate", None)
    if _is_full(error):
        return disk_reserve.full()
    is_servers = state is None or state in RETRIED_SQLSTATES or state[:2] in UNAVAILABLE_SQLSTATE_CLASSES
    if isinstance(error, OperationalError) or is_servers:
        return Unavailable("database-unavailable", UNAVAILABLE, detail=str(error.orig)[:200])
    return error


def _pause_before_retry(attempt: int) -> float:
    return random.uniform(0, 0.05 * 2**attempt)  # full jitter; a deadlock's victims must not meet again


class Savepoint:
    """A part of a transaction that can be undone alone. As a block: kept when the block ends, undone when it raises."""

    __slots__ = ("_run", "is_active")
    # Savepoints nest strictly, so one name serves all: a statement means the innermost.

    def __init__(self, run: Callable[[str], object]) -> None:
        self._run = run
        run("SAVEPOINT part")
        self.is_active = True

    def commit(self) -> None:
        self.is_active = False
        self._run("RELEASE SAVEPOINT part")

    def rollback(self) -> None:
        self.is_active = False
        self._run("ROLLBACK TO SAVEPOINT part")
        self._run("RELEASE SAVEPOINT part")

    def __enter__(self) -> "Savepoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.rollback()


class LeanSession:
    """What transactions use of a `Session`, straight on the connection: no mapped objects, so no unit of work to keep.

    SQLAlchemy's own took a third of the CPU time of each statement and transaction.
    """

    __slots__ = ("_connection", "execute")

    def __init__(self, connection: Connection, statements: Statements | None = None) -> None:
        """`statements`: those that need not go through SQLAlchemy each time; None: there are none (PostgreSQL)."""
        self._connection = connection
        self.execute: Callable[..., Any] = connection.execute if statements is None else partial(statements.execute, connection)

    def scalar(self, statement: Any, parameters: Any = None) -> Any:
        return self.execute(statement, parameters).scalar()

    def scalars(self, statement: Any, parameters: Any = None) -> Any:
        return self.execute(statement, parameters).scalars()

    def begin_nested(self) -> Savepoint:
        if self._connection.dialect.name == "sqlite":
            return Savepoint(partial(kept.run, self._connection))
        return Savepoint(self._connection.exec_driver_sql)

    def connection(self) -> Connection:
        return self._connection

    def get_bind(self) -> Connection:
        return self._connection


class _Spoiled(Exception):
    """A member of a group met an error that may have ended the transaction of all; nothing was committed."""


class Database:
    """Transactions for threads: workers, the engine, the CLI's `init`."""

    def __init__(self, url: str, *, pool_size: int = 8, on_commit: Callable[[int], None] = lambda _count: None) -> None:
        """`url`: `sqlite:///PATH` or `postgresql+psycopg://...`; at most `pool_size` connections, opened when needed.

        `on_commit` is called after each commit with how many transactions went into it: the metrics.
        """
        parsed = sa.make_url(url)
        self._on_commit = on_commit
        self.engine = sa.create_engine(
            parsed,
            connect_args=_connect_arguments(parsed),
            pool_size=pool_size,
            max_overflow=OVERFLOW,
            pool_timeout=kept.POOL_TIMEOUT_S,
            pool_pre_ping=parsed.get_backend_name() != "sqlite",
            json_deserializer=_read_json,
        )
        _configure(self.engine)
        self.reserve: DiskReserve | TableReserve = DiskReserve(url) if self.dialect == "sqlite" else TableReserve(self.engine)
        self._statements = Statements(self.engine.dialect) if self.dialect == "sqlite" else None
        self._kept = KeptConnections(self.engine, size=pool_size + OVERFLOW) if self.dialect == "sqlite" else None
        self._group = GroupCommit(self.write_pieces) if self.dialect == "sqlite" else None

    @property
    def dialect(self) -> str:
        return self.engine.dialect.name

    def write(self, transaction: Callable[[Session], T], *, durable: bool = True) -> T:
        """Run `transaction` and commit. Raises Unavailable when the database is full or gone; nothing is half-written."""
        if self._group is not None:
            return self._group.run(transaction, durable=durable)
        result = self._write(transaction, durable=durable)
        self._on_commit(1)
        return result

    def read(self, query: Callable[[Session], T]) -> T:
        """Run `query` on one consistent snapshot (SQLite) or read-committed (PostgreSQL); again where the server asks for that."""
        for attempt in range(TRIES):
            try:
                with self._begin() as session:
                    return query(session)
            except FAILURES as error:
                if attempt + 1 < TRIES and _is_retried(error):
                    time.sleep(_pause_before_retry(attempt))
                    continue
                raise _translate(error) from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        self.engine.dispose()

    def _write(self, transaction: Callable[[Session], T], *, durable: bool) -> T:
        for attempt in range(TRIES):
            try:
                with self._begin(is_write=True, is_durable=durable) as session:
                    return transaction(session)
            except FAILURES as error:
                if attempt + 1 < TRIES and _is_full(error) and self.reserve.give_up():
                    continue
                if attempt + 1 < TRIES and _is_retried(error):
                    time.sleep(_pause_before_retry(attempt))
                    continue
                raise _translate(error) from error
        raise AssertionError("unreachable")

    def write_pieces(self, pieces: Sequence[Piece]) -> None:
        """Run several pieces of work in one transaction; one that fails is undone alone."""
        if len(pieces) > 1 and self._write_together(pieces):
            return
        for piece in pieces:
            self._write_alone(piece)

    def _write_alone(self, piece: Piece) -> None:
        try:
            piece.result = self._write(piece.work, durable=piece.durable)
        except Exception as error:  # noqa: BLE001 belongs to whoever waits for this piece
            piece.error = error
        else:
            self._on_commit(1)

    def _write_together(self, pieces: Sequence[Piece]) -> bool:
        """Return whether the pieces are written and answered; False where one of them spoiled the transaction and nothing was.

        Some errors end SQLite's whole transaction, and some are one statement's own though they look like the database's ("too many
        variables"): alone, each piece meets its own and nobody else's.
        """

        def work(session: Session) -> None:
            for piece in pieces:
                piece.result = piece.error = None  # it may run for the second time
                try:
                    with session.begin_nested():
                        piece.result = piece.work(session)
                except DBAPIError as error:
                    if not isinstance(error, IntegrityError):
                        raise _Spoiled from error
                    piece.error = error
                except Exception as error:  # noqa: BLE001 belongs to whoever waits for this piece
                    piece.error = error

        try:
            self._write(work, durable=any(piece.durable for piece in pieces))
        except _Spoiled:
            for piece in pieces:
                piece.result = piece.error = None
            return False
        self._on_commit(len(pieces))
        return True

    @contextmanager
    def _begin(self, *, is_write: bool = False, is_durable: bool = True) -> Iterator[Session]:
        if self._kept is not None:
            with self._kept.transaction(is_write=is_write, is_durable=is_durable) as connection:
                yield cast(Session, LeanSession(connection, self._statements))
            return
        with self.engine.connect() as connection:
            connection.execution_options(**{_WRITE: is_write, _DURABLE: is_durable})
            with connection.begin():
                yield cast(Session, LeanSession(connection))


SQLITE_READERS = 3
"""A read of SQLite is computing in this process: more at once only take turns, and all end late. Three, so that a long one leaves room."""
POSTGRES_CONNECTIONS = 16


class AsyncDatabase:
    """The same for the event loop: each transaction runs in a thread, so the loop never blocks."""

    def __init__(self, url: str, *, pool_size: int = 0, on_commit: Callable[[int], None] = lambda _count: None) -> None:
        """`pool_size` 0: what suits the kind of database."""
        pool_size = pool_size or (SQLITE_READERS if url.startswith("sqlite") else POSTGRES_CONNECTIONS)
        self._database = Database(url, pool_size=pool_size, on_commit=on_commit)
        self._threads = ThreadPoolExecutor(pool_size, thread_name_prefix="database")
        self._commits = CommitThread(self._database.write_pieces) if self._database.dialect == "sqlite" else None

    @property
    def reserve(self) -> DiskReserve | TableReserve:
        return self._database.reserve

    async def write(self, transaction: Callable[[Session], T], *, durable: bool = True) -> T:
        """As `Database.write`. One whose caller gives up meanwhile is committed nevertheless."""
        if self._commits is not None:
            return await self._commits.run(transaction, durable=durable)
        return await self._run(lambda: self._database.write(transaction, durable=durable))

    async def read(self, query: Callable[[Session], T]) -> T:
        """As `Database.read`."""
        return await self._run(lambda: self._database.read(query))

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def close(self) -> None:
        if self._commits is not None:
            await asyncio.to_thread(self._commits.close)
        await asyncio.to_thread(self._threads.shutdown)
        self._database.close()


def migration_engine(url: str) -> Engine:
    """Return an engine for Alembic: no pool, plain transactions."""
    engine = sa.create_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", kept.configure_connection)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine
