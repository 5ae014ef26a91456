"""Group commit: while one transaction is being written, what arrives meanwhile becomes the next one.

A thousand hosts that report at once cost a few transactions, and one host alone waits for nobody. Each piece of work is a
function of a session; a piece that fails is found by running the pieces of that batch one by one.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from trimtab_controller import metrics
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Unavailable

T = TypeVar("T")
log = structlog.get_logger(__name__)

BATCH_MAX = 32
"""Bounds how long one transaction keeps SQLite's only write lock from the engine, whose beat must not wait for a fleet's return."""
WAITING_MAX = 20_000
GATHER_S = 0.02
"""Between the beginnings of two commits, unless a batch is full: events of a busy fleet come one by one, and each commit keeps the
write lock of SQLite from the others and waits for the disk. One that comes after a pause waits for nobody."""


class GroupCommitter:
    """Commits from one thread, in order of arrival. `commit` may be called from any task of the loop that runs `run`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[tuple[Callable[[Session], Any], asyncio.Future[Any]]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="committer")

    async def commit(self, work: Callable[[Session], T]) -> T:
        """Return what `work` returned, once it is durable. Raises what it raised, or Unavailable; then nothing of it is written."""
        if len(self._waiting) >= WAITING_MAX:
            raise Unavailable("gateway-busy", "the controller cannot keep up; retry later")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, future))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Commit until cancelled."""
        loop = asyncio.get_running_loop()
        began_s = loop.time() - GATHER_S
        batch: list[tuple[Callable[[Session], Any], asyncio.Future[Any]]] = []
        try:
            while True:
                await self._arrived.wait()
                pause_s = began_s + GATHER_S - loop.time()
                if pause_s > 0 and len(self._waiting) < BATCH_MAX:
                    await asyncio.sleep(pause_s)
                began_s = loop.time()
                batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
                if not self._waiting:
                    self._arrived.clear()
                # Those who gave up (their stream ended) are not worth a write.
                batch = [(work, future) for work, future in batch if not future.done()]
                if batch:
                    outcomes = await loop.run_in_executor(self._thread, self._commit, [work for work, _future in batch])
                    _settle(batch, outcomes)
        finally:
            for _work, future in [*batch, *self._waiting]:
                future.cancel()
            self._thread.shutdown(wait=False)

    def _commit(self, works: list[Callable[[Session], Any]]) -> list[tuple[Any, Exception | None]]:
        started = time.monotonic()
        try:
            return [(result, None) for result in self._database.write(lambda session: [work(session) for work in works])]
        except Unavailable as error:
            return [(None, error)] * len(works)
        except Exception as error:  # noqa: BLE001 it is given to whoever waits for this piece
            if len(works) == 1:
                return [(None, error)]
            log.debug("batch failed, committing one by one", works=len(works), error=type(error).__name__)
            return [outcome for work in works for outcome in self._commit([work])]
        finally:
            metrics.COMMIT_SECONDS.observe(time.monotonic() - started)
            metrics.COMMIT_SIZE.observe(len(works))


def _settle(
    batch: list[tuple[Callable[[Session], Any], asyncio.Future[Any]]], outcomes: list[tuple[Any, Exception | None]]
) -> None:
    for (_work, future), (result, error) in zip(batch, outcomes, strict=True):
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
