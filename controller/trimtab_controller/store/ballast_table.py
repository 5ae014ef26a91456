"""Space kept for the leases on the disk of a PostgreSQL server, which the controller cannot look at; see `store/disk_reserve.py`.

The ballast is a table. Whoever meets a full disk drops it: that takes no space, where emptying one would (`TRUNCATE` makes new files).
While there is none, mutations are refused; it is laid down anew as soon as it fits. It is unlogged: filling it writes no WAL, a segment of
which that does not fit ends the whole server, and a standby does without. After a crash of the server it is empty and is filled again.
"""

import os
import time

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.disk_reserve import BALLAST_BYTES, full

log = structlog.get_logger(__name__)

DISK_FULL = "53100"
PIECE_BYTES = 1 << 20
TRY_AGAIN_S = 30.0
"""From one try to lay it down to the next: each fills the disk up for a moment."""
_LOCK = 0x74746272
"""One of many controllers does it at a time. Any number that nobody else uses here."""
_IS_THERE = sa.text("SELECT to_regclass('ballast') IS NOT NULL")
_HAS_ANY = sa.select(sa.exists().select_from(schema.ballast))
_DRAFT = schema.ballast.to_metadata(sa.MetaData(), name="ballast_draft")
_MAKE_DRAFT = sa.text("CREATE UNLOGGED TABLE IF NOT EXISTS ballast_draft (position INTEGER PRIMARY KEY, filler BYTEA NOT NULL)")


class TableReserve:
    """Safe to use from several processes and threads: the table is there or not."""

    def __init__(self, engine: sa.Engine, *, ballast_bytes: int = BALLAST_BYTES) -> None:
        self._engine = engine
        self._pieces = ballast_bytes // PIECE_BYTES
        self._not_before_s = 0.0

    def fill(self, *, keep_free_bytes: int = 0) -> None:  # noqa: ARG002 how much is free nobody tells here
        """Lay the ballast down where it is missing and fits."""
        if time.monotonic() < self._not_before_s:
            return
        try:
            with self._autocommitting() as connection:
                if connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK))):
                    try:
                        self._fill(connection)
                    finally:
                        connection.execute(sa.select(sa.func.pg_advisory_unlock(_LOCK)))
        except DBAPIError as error:
            self._not_before_s = time.monotonic() + TRY_AGAIN_S
            log.warning("no space kept for leases", error=str(error.orig)[:200])
            if getattr(error.orig, "sqlstate", None) == DISK_FULL:
                self._drop("ballast", "ballast_draft")

    def give_up(self) -> bool:
        """Free the ballast; False where there was none."""
        try:
            with self._engine.connect() as connection:
                if not connection.scalar(_IS_THERE) or not connection.scalar(_HAS_ANY):
                    return False
        except DBAPIError:
            return False
        if self._drop("ballast"):
            self._not_before_s = time.monotonic() + TRY_AGAIN_S
            log.error("the disk of the database is full; what was kept for leases is used now")
            return True
        return False

    def check_room(self, *, keep_free_bytes: int = 0) -> None:
        """Nothing to see from here: `refuse_if_spent` asks the database."""

    def refuse_if_spent(self, session: Session) -> None:
        """Raise Unavailable(`database-full`) where a mutation would take what leases need."""
        if not session.scalar(_IS_THERE):
            raise full("what was kept for leases is in use")

    def _autocommitting(self) -> sa.Connection:
        return self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _fill(self, connection: sa.Connection) -> None:
        is_there = connection.scalar(_IS_THERE)
        if not is_there:
            connection.execute(_MAKE_DRAFT)
        table = schema.ballast if is_there else _DRAFT
        laid = connection.scalar(sa.select(sa.func.count()).select_from(table))
        for position in range(int(laid or 0), self._pieces):
            piece = {"position": position, "filler": os.urandom(PIECE_BYTES)}  # nothing that a file system could make small
            connection.execute(table.insert().values(piece))
        if not is_there:
            connection.execute(sa.text("ALTER TABLE ballast_draft RENAME TO ballast"))

    def _drop(self, *tables: str) -> bool:
        try:
            with self._autocommitting() as connection:
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {', '.join(tables)}"))
        except DBAPIError as error:
            log.warning("the space kept for leases is not freed", error=str(error.orig)[:200])
            return False
        return True
