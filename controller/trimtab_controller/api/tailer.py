"""Follows the event table once per process and fans out to watchers, so that a thousand watchers cost one query each 0.25 s.

A watcher first subscribes, then reads from SQL what it missed, then takes from its queue what has a higher number. A watcher that
is too slow loses its queue, is told so (`has_gap`), and reads from SQL again: nobody's slowness costs memory or another's time.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from trimtab_controller.api.settled_events import SettledEvents
from trimtab_controller.core.model import Event
from trimtab_controller.store import events
from trimtab_controller.store.database import AsyncDatabase
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)

QUEUE_MAX = 1000
BATCH = 500
RETRY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interest:
    """Which events a watcher may and wants to see."""

    # None: of all projects, and the fleet's own.
    project_ids: Sequence[str] | None
    subject_id: str = ""
    kind_prefix: str = ""
    operation_id: str = ""

    def takes(self, event: Event) -> bool:
        return (
            (self.project_ids is None or event.project_id in self.project_ids)
            and (not self.subject_id or event.subject_id == self.subject_id)
            and (not self.operation_id or event.operation_id == self.operation_id)
            and event.kind.startswith(self.kind_prefix)
        )


class Subscription:
    """One watcher's queue."""

    def __init__(self, interest: Interest) -> None:
        self.interest = interest
        self.has_gap = False
        self._queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE_MAX)
        self._wake = asyncio.Event()

    def offer(self, event: Event) -> None:
        if self.has_gap or not self.interest.takes(event):
            return
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self.has_gap = True
            self._clear()
        self._wake.set()

    def begin_again(self) -> None:
        """Take events again; what came before is the reader's to fetch from SQL, after this."""
        self._clear()
        self.has_gap = False

    async def take(self, timeout_s: float) -> list[Event]:
        """Return what is there, waiting up to `timeout_s` for the first; [] on timeout or gap."""
        if self._queue.empty() and not self.has_gap:
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), timeout_s)
            except TimeoutError:
                return []
        taken = []
        while not self._queue.empty():
            taken.append(self._queue.get_nowait())
        return taken

    def _clear(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()


class EventTailer:
    def __init__(self, db: AsyncDatabase, settled: SettledEvents, *, poll_s: float) -> None:
        self._db, self._settled, self._poll_s = db, settled, poll_s
        self._subscriptions: set[Subscription] = set()
        self._position: int | None = None
        self._is_wanted, self._is_following = asyncio.Event(), asyncio.Event()

    @property
    def watchers(self) -> int:
        return len(self._subscriptions)

    @property
    def position(self) -> int | None:
        """The number of the newest event handed out; None while nobody watches."""
        return self._position

    @contextmanager
    def subscribe(self, interest: Interest) -> Iterator[Subscription]:
        subscription = Subscription(interest)
        self._subscriptions.add(subscription)
        self._is_wanted.set()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    async def ready(self) -> None:
        """Return once events that commit from now on reach the subscriptions."""
        await self._is_following.wait()

    async def run(self) -> None:
        """Follow until cancelled; rests while nobody watches."""
        while True:
            if not self._subscriptions:
                self._rest()
            await self._is_wanted.wait()
            try:
                await self._follow_once()
            except Unavailable as error:
                log.warning("events cannot be read", error=error.code)
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(self._poll_s)

    def _rest(self) -> None:
        self._is_wanted.clear()
        self._is_following.clear()
        self._position = None

    async def _follow_once(self) -> None:
        settled = await self._settled.newest()
        if self._position is None:
            # What came before is the watchers' to read from SQL; they begin only now.
            self._position = settled
            self._is_following.set()
        position = self._position
        if settled <= position:
            return
        found = await self._db.read(lambda session: events.page_after(session, position, until=settled, limit=BATCH))
        for event in found:
            for subscription in self._subscriptions:
                subscription.offer(event)
            self._position = event.seq
