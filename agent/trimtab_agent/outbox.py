"""What the controller must not miss: ends of jobs and domain events, on disk until acknowledged, sent again after a reconnect.

Bounded: while no controller listens for long, the oldest domain events go first (the next Hello carries every domain anyway);
ends of jobs are never dropped. Sequences grow for as long as the journal file lives.
"""

import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

from trimtab_agent.journal import JournalFile

CAPACITY = 10_000


class ItemKind(StrEnum):
    JOB = "job"
    DOMAIN_EVENT = "domain_event"


@dataclass(frozen=True, slots=True)
class StoredItem:
    sequence: int
    kind: ItemKind
    body: bytes
    """The serialised message of the item's kind."""


class Outbox:
    """The outbox of one agent. Thread-safe."""

    def __init__(self, file: JournalFile, agent_id: str, *, capacity: int = CAPACITY) -> None:
        self._file = file
        self._agent_id = agent_id
        self._capacity = capacity
        self._on_added: Callable[[], None] = lambda: None
        self._stored = file.submit(self._count).result()

    @property
    def stored(self) -> int:
        """Items that wait for an acknowledgement."""
        return self._stored

    def notify(self, on_added: Callable[[], None]) -> None:
        """Call `on_added` after each commit that added something, from the journal's thread; it must not block."""
        self._on_added = on_added

    def add(self, kind: ItemKind, body: bytes) -> Future[None]:
        """Store one item; does not wait for the disk."""
        future = self._file.submit(lambda connection: self.insert(connection, kind, body))
        future.add_done_callback(self.committed)
        return future

    def insert(self, connection: sqlite3.Connection, kind: ItemKind, body: bytes) -> None:
        """Store one item within the caller's journal transaction; call `committed` after it."""
        connection.execute("INSERT INTO outbox (agent_id, kind, body) VALUES (?, ?, ?)", (self._agent_id, kind.value, body))
        self._stored += 1
        if self._stored > self._capacity:
            self._drop_oldest_event(connection)

    def committed(self, future: Future[None]) -> None:
        if future.exception() is None:
            self._on_added()

    def read(self, *, after: int, limit: int) -> Future[list[StoredItem]]:
        """Return items above a sequence, oldest first."""

        def work(connection: sqlite3.Connection) -> list[StoredItem]:
            rows = connection.execute(
                "SELECT sequence, kind, body FROM outbox WHERE agent_id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (self._agent_id, after, limit),
            )
            return [StoredItem(sequence, ItemKind(kind), body) for sequence, kind, body in rows]

        return self._file.submit(work)

    def acknowledge(self, sequence: int) -> Future[None]:
        """Forget everything up to `sequence`: it is durable on the controller."""

        def work(connection: sqlite3.Connection) -> None:
            gone = connection.execute(
                "DELETE FROM outbox WHERE agent_id = ? AND sequence <= ?", (self._agent_id, sequence)
            ).rowcount
            self._stored -= gone

        return self._file.submit(work)

    def _count(self, connection: sqlite3.Connection) -> int:
        (count,) = connection.execute("SELECT count(*) FROM outbox WHERE agent_id = ?", (self._agent_id,)).fetchone()
        return int(count)

    def _drop_oldest_event(self, connection: sqlite3.Connection) -> None:
        gone = connection.execute(
            "DELETE FROM outbox WHERE sequence = (SELECT sequence FROM outbox WHERE agent_id = ? AND kind = ?"
            " ORDER BY sequence LIMIT 1)",
            (self._agent_id, ItemKind.DOMAIN_EVENT.value),
        ).rowcount
        self._stored -= gone
