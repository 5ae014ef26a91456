"""Group commit for threads of one process: while one transaction is being written, what arrives meanwhile becomes the next one.

SQLite has one write lock. Threads (or processes) that fight over it sleep in its busy handler, up to a tenth of a second a time,
and each pays an fsync of its own. Here they queue in memory instead: whoever finds nobody writing leads, writes everything that
waits as one transaction, then hands the lead to the next that came meanwhile. One thread alone waits for nobody.

Each piece of work is in a savepoint of its own: one that fails is undone alone. No piece is answered before the commit.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

BATCH_MAX = 32
"""Bounds how long one transaction keeps other processes from the lock."""


@dataclass(slots=True, eq=False)
class Piece:
    """One transaction that somebody waits for; whoever leads fills in what came of it."""

    work: Callable[[Any], Any]
    durable: bool
    result: Any = None
    error: BaseException | None = None
    is_done: bool = False
    woken: threading.Event = field(default_factory=threading.Event)


class GroupCommit:
    """Thread-safe. Keeps no thread of its own."""

    def __init__(self, write: Callable[[Sequence[Piece]], None]) -> None:
        """`write` runs the pieces in one transaction, commits, and sets `result` or `error` of each; an error of its own is all of theirs."""
        self._write = write
        self._guard = threading.Lock()
        self._waiting: list[Piece] = []
        self._is_led = False

    def run(self, work: Callable[[Any], T], *, durable: bool) -> T:
        """Return what `work` returned, once that is committed; raise what it raised, or why nothing could be committed."""
        piece = Piece(work, durable)
        with self._guard:
            self._waiting.append(piece)
            leads = not self._is_led
            self._is_led = True
        if not leads:
            piece.woken.wait()  # written by another, or told to lead
        if not piece.is_done:
            self._lead()
        if piece.error is not None:
            raise piece.error
        result: T = piece.result
        return result

    def _lead(self) -> None:
        """Write what waits, ourselves among the first; then wake those that were served and the next leader."""
        with self._guard:
            batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
        try:
            self._write(batch)
        except BaseException as error:  # noqa: BLE001 each of them raises it in its own thread
            for piece in batch:
                piece.error = error
        for piece in batch:
            piece.is_done = True
        with self._guard:
            following = self._waiting[:1]
            self._is_led = bool(following)
        for piece in (*batch, *following):
            piece.woken.set()
