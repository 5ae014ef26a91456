"""Connections to SQLite that stay open between transactions, which are begun and ended on the driver itself.

SQLAlchemy's own way, a connection of its pool and a transaction object with its events for each, costs ten times what SQLite does:
a fifth of the CPU time of an operation's driver, which runs a dozen short transactions.
"""

import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError

BUSY_TIMEOUT_MS = 30_000
# Between two looks at another process' write lock; half a commit.
LOCK_POLL_S = (0.0005, 0.002)
POOL_TIMEOUT_S = 10.0

# What a connection's `synchronous` is at the moment; changing it is a statement that most transactions need not run.
_LEVEL = "trimtab_level"


def configure(engine: Engine) -> None:
    """Attach what makes new connections of an SQLite engine behave as `database` says."""
    sa.event.listen(engine, "connect", configure_connection)


def configure_connection(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_MS}", "temp_store=MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def run(connection: Connection, statement: str) -> None:
    """Run a statement of ours on the driver itself: every transaction pays for it, and SQLAlchemy's way costs ten times as much."""
    driver: Any = connection.connection.dbapi_connection
    try:
        driver.execute(statement)
    except sqlite3.Error as error:
        raise OperationalError(statement, None, error) from error


class KeptConnections:
    """Thread-safe. A transaction of SQLAlchemy's, which it begins by itself at the first statement, is open on each for ever: it is
    never told of the driver's.
    """

    def __init__(self, engine: Engine, *, size: int) -> None:
        """`size`: how many transactions may be under way at once; further ones wait."""
        self._engine = engine
        self._free: list[Connection] = []
        # Grows with each `close`: what was in use then is closed when it comes back.
        self._era = 0
        self._room = threading.BoundedSemaphore(size)
        sa.event.listen(engine, "engine_disposed", lambda _engine: self.close())

    def close(self) -> None:
        """Close the connections, those in use once their transactions have ended."""
        self._era += 1
        while self._free:
            self._free.pop().close()

    @contextmanager
    def transaction(self, *, is_write: bool, is_durable: bool) -> Iterator[Connection]:
        """Begin; commit where the block ends, roll back where it raises."""
        if not self._room.acquire(timeout=POOL_TIMEOUT_S):
            raise sa.exc.TimeoutError(f"no connection to the database came free within {POOL_TIMEOUT_S:.0f} s")
        try:
            era, connection = self._era, self._take()
            is_sound = False
            try:
                driver: Any = connection.connection.dbapi_connection
                _begin(connection, driver, is_write=is_write, is_durable=is_durable)
                try:
                    yield connection
                    _commit(connection, driver)
                except BaseException:
                    if driver.in_transaction:  # some errors end it by themselves
                        driver.execute("ROLLBACK")
                    raise
                finally:
                    is_sound = not driver.in_transaction
            finally:
                self._give_back(connection, is_kept=is_sound and era == self._era)
        finally:
            self._room.release()

    def _take(self) -> Connection:
        try:
            return self._free.pop()
        except IndexError:
            return self._engine.connect()

    def _give_back(self, connection: Connection, *, is_kept: bool) -> None:
        if is_kept:
            self._free.append(connection)
            return
        with suppress(DBAPIError, sqlite3.Error):
            connection.invalidate()
            connection.close()


def _begin(connection: Connection, driver: Any, *, is_write: bool, is_durable: bool) -> None:
    if not is_write:
        run(connection, "BEGIN")
        return
    level = "FULL" if is_durable else "NORMAL"
    if connection.info.get(_LEVEL) != level:
        run(connection, f"PRAGMA synchronous={level}")
        connection.info[_LEVEL] = level
    _take_write_lock(driver)


def _take_write_lock(driver: Any) -> None:
    """Begin to write, as soon as no other process does.

    SQLite's own waiting sleeps longer each time, up to a tenth of a second, while others come and go: under load the processes of
    one node wait most of their time for a lock that is held for milliseconds.
    """
    ends_s = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    driver.execute("PRAGMA busy_timeout=0")
    try:
        while True:
            try:
                driver.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.Error as error:
                is_busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() >= ends_s:
                    raise OperationalError("BEGIN IMMEDIATE", None, error) from error
            time.sleep(random.uniform(*LOCK_POLL_S))
    finally:
        driver.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")


def _commit(connection: Connection, driver: Any) -> None:
    try:
        driver.execute("COMMIT")
    except sqlite3.Error as error:
        raise DBAPIError.instance("COMMIT", None, error, sqlite3.Error, dialect=connection.dialect) from error
