"""What one API process keeps while it runs: limits, threads for what blocks, the tail of the events."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import structlog

from trimtab_controller.api.context import ApiContext
from trimtab_controller.api.limits import RateLimit
from trimtab_controller.api.resources.vm_summaries import SummaryTexts
from trimtab_controller.api.settled_events import SettledEvents
from trimtab_controller.api.spool import Spool
from trimtab_controller.api.tailer import EventTailer
from trimtab_controller.store import identity
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)

# A read costs less than a write and happens more often.
READ_COST = 0.25
SPOOL_SWEEP_S = 600.0


class Runtime:
    def __init__(self, context: ApiContext) -> None:
        settings, clock_s = context.settings, context.clock.boottime_s
        self.context = context
        rate = settings.rate_limit_per_s
        self.user_rate = RateLimit(per_s=rate, burst=4 * rate, clock_s=clock_s)
        self.address_rate = RateLimit(per_s=16 * rate, burst=64 * rate, clock_s=clock_s)
        self.login_rate = RateLimit(per_s=settings.login_failures_per_s, burst=settings.login_failures_burst, clock_s=clock_s)
        # Apart from each other: agents that hang must not stop uploads, and the other way round.
        self.agent_threads = ThreadPoolExecutor(8, thread_name_prefix="console")
        self.spool = Spool(context)
        self.settled_events = SettledEvents(context.db)
        self.tailer = EventTailer(context.db, self.settled_events, poll_s=settings.tail_poll_s)
        self.summaries = SummaryTexts()
        self.open_consoles = 0
        self._noted: dict[str, datetime] = {}
        self._background: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._spawn(self.tailer.run())
        self._spawn(self._sweep_spool())

    async def stop(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self.agent_threads.shutdown(wait=False, cancel_futures=True)
        self.spool.close()

    def note_token_use(self, token_id: str) -> None:
        """Write when a token was last used, beside the request; at most once a minute and token."""
        now = self.context.clock.now()
        last = self._noted.get(token_id)
        if last is not None and (now - last).total_seconds() < 60:
            return
        if len(self._noted) > 10_000:
            self._noted.clear()
        self._noted[token_id] = now
        self._spawn(self._note(token_id, now))

    async def _note(self, token_id: str, now: datetime) -> None:
        try:
            await self.context.db.write(lambda session: identity.note_token_use(session, token_id, now), durable=False)
        except Unavailable as error:
            log.warning("use of a token not noted", token_id=token_id, error=error.code)

    async def _sweep_spool(self) -> None:
        while True:
            try:
                await self.spool.sweep()
            except Unavailable as error:
                log.warning("spool not swept", error=error.code)
            await asyncio.sleep(SPOOL_SWEEP_S)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
