"""How far this process may read the events without losing one that commits late; shared by pages, streams and the tailer."""

import asyncio

from trimtab_controller.store import event_horizon
from trimtab_controller.store.database import AsyncDatabase

# A transaction that appends an event lives for milliseconds; one that hangs holds readers back, but not its caller for ever.
WAIT_S = 1.0
# As long as nothing is known: longer than the database lets any transaction hang.
FIRST_WAIT_S = 30.0
POLL_S = 0.01


class SettledEvents:
    def __init__(self, db: AsyncDatabase, *, first_wait_s: float = FIRST_WAIT_S) -> None:
        self._db, self._first_wait_s = db, first_wait_s
        self._newest = 0

    async def newest(self) -> int:
        """Return the number up to which no event can appear any more.

        It includes what was committed before the call, unless a transaction that was writing events then is still open a second
        later: then it is what this process knew before.
        """
        first = latest = await self._db.read(event_horizon.sight)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + (WAIT_S if self._newest else self._first_wait_s)
        while not first.is_settled_at(latest) and loop.time() < deadline_s:
            await asyncio.sleep(POLL_S)
            latest = await self._db.read(event_horizon.sight)
        if first.is_settled_at(latest):
            self._newest = max(self._newest, first.newest)
        return self._newest
