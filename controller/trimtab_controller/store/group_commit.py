"""Group commit for threads of one process: while one transaction is being written, what arrives meanwhile becomes the next one.

SQLite has one write lock. Threads (or processes) that fight over it sleep in its busy handler, up to a tenth of a second a time,
and each pays an fsync of its own. Here they queue in memory instead: whoever finds nobody writing leads, writes everything that
waits as one transaction, then hands the lead to the next that came meanwhile. One thread alone waits for nobody.

Each piece of work is in a savepoint of its own: one that fails is undone alone. No piece is answered before the commit; what a
killed process had not answered may be lost, and nothing else.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trimtab_protos.errors import Unavailable

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
        # The thread that writes now.
        self._leader: int | None = None

    def run(self, work: Callable[[Any], T], *, durable: bool) -> T:
        """Return what `work` returned, once that is committed; raise what it raised, or why nothing could be committed."""
        if self._leader == threading.get_ident():
            raise RuntimeError("a transaction was begun inside of another one: it would wait for itself")
        piece = Piece(work, durable)
        with self._guard:
            self._waiting.append(piece)
            leads = not self._is_led
            self._is_led = True
        if not leads:
            self._await(piece)
        if not piece.is_done:
            self._lead()
        if piece.error is not None:
            raise piece.error
        result: T = piece.result
        return result

    def _await(self, piece: Piece) -> None:
        """Return when the piece was written by another, or when it is ours to lead."""
        try:
            piece.woken.wait()
        except BaseException:
            # Interrupted (a signal's handler): nobody waits for this piece any more, and the lead must not end with us.
            with self._guard:
                is_ours_to_lead = piece.woken.is_set() and not piece.is_done
                if piece in self._waiting:
                    self._waiting.remove(piece)
            if is_ours_to_lead:
                self._hand_on(())
            raise

    def _lead(self) -> None:
        """Write what waits, ourselves among the first; then wake those that were served and the next leader."""
        with self._guard:
            batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
        self._leader = threading.get_ident()
        try:
            self._write(batch)
        except Exception as error:  # noqa: BLE001 each of them raises it in its own thread
            for piece in batch:
                piece.error = error
        except BaseException:
            # The end of this thread is not the end of the others; whether anything was committed is not known.
            for piece in batch:
                piece.error = Unavailable("write-interrupted", "the controller is stopping; look before you try again")
            raise
        finally:
            self._leader = None
            for piece in batch:
                piece.is_done = True
            self._hand_on(batch)

    def _hand_on(self, served: Sequence[Piece]) -> None:
        with self._guard:
            following = self._waiting[:1]
            self._is_led = bool(following)
            for piece in (*served, *following):
                piece.woken.set()


class CommitThread:
    """The same for an event loop: one thread of its own writes what waits and wakes the loop once for all that it wrote.

    A thread for each transaction that waits would be woken twice for it: to begin, and when it is written.
    """

    def __init__(self, write: Callable[[Sequence[Piece]], None]) -> None:
        """`write`: as `GroupCommit`'s."""
        self._write = write
        self._queue: queue.SimpleQueue[_Awaited | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[Any], T], *, durable: bool) -> T:
        """Return what `work` returned, once that is committed; one whose caller gives up is committed nevertheless."""
        loop = asyncio.get_running_loop()
        awaited = _Awaited(Piece(work, durable), loop, loop.create_future())
        self._queue.put(awaited)
        result: T = await awaited.future
        return result

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            taken = [self._queue.get()]
            while len(taken) < BATCH_MAX and not self._queue.empty():
                taken.append(self._queue.get())
            is_open = None not in taken
            batch = [one for one in taken if one is not None]
            if batch:
                self._write_batch(batch)

    def _write_batch(self, batch: "Sequence[_Awaited]") -> None:
        pieces = [one.piece for one in batch]
        try:
            self._write(pieces)
        except BaseException as error:  # noqa: BLE001 each of them raises it where it is waited for; the thread goes on
            for piece in pieces:
                piece.error = error
        for loop in {one.loop for one in batch}:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, [one for one in batch if one.loop is loop])


@dataclass(frozen=True, slots=True, eq=False)
class _Awaited:
    piece: Piece
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


def _settle(batch: Sequence[_Awaited]) -> None:
    for one in batch:
        if one.future.done():
            continue  # its caller gave up
        if one.piece.error is not None:
            one.future.set_exception(one.piece.error)
        else:
            one.future.set_result(one.piece.result)
