"""The highest numbers that controllers ever gave to this host, durable in the journal: it says them in each Hello.

A controller whose database is a copy of yesterday has lower ones, and learns so from them that it must not act. A journal that was lost
says 0, which proves nothing. What was given a moment ago and is not on disk yet is said all the same.
"""

import sqlite3
from dataclasses import dataclass

from trimtab_agent.journal import JournalFile


@dataclass(frozen=True, slots=True)
class Given:
    """`lease_number`: of the host's sessions; `database_mark`: of the controller's database."""

    lease_number: int = 0
    database_mark: int = 0


class GivenNumbers:
    """Lives on the session's event loop; the journal's thread writes."""

    def __init__(self, file: JournalFile, agent_id: str) -> None:
        self._file = file
        self._agent_id = agent_id
        self._highest: Given = file.submit(self._read).result()

    @property
    def highest(self) -> Given:
        return self._highest

    def take(self, *, lease_number: int = 0, database_mark: int = 0) -> None:
        """Remember what is higher than before; never waits. A disk that fails costs the memory, not the lease."""
        before = self._highest
        self._highest = Given(max(before.lease_number, lease_number), max(before.database_mark, database_mark))
        if self._highest != before:
            self._file.submit(self._write)

    def _read(self, connection: sqlite3.Connection) -> Given:
        row = connection.execute("SELECT lease_number, database_mark FROM given WHERE agent_id = ?", (self._agent_id,)).fetchone()
        return Given(int(row[0]), int(row[1])) if row else Given()

    def _write(self, connection: sqlite3.Connection) -> None:
        highest = self._highest
        connection.execute(
            "INSERT INTO given VALUES (?, ?, ?) ON CONFLICT (agent_id) DO UPDATE SET"
            " lease_number = max(lease_number, excluded.lease_number), database_mark = max(database_mark, excluded.database_mark)",
            (self._agent_id, highest.lease_number, highest.database_mark),
        )
