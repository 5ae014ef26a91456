"""Bounded pools of threads for calls that block: libvirt, storage, jobs.

Why not `concurrent.futures`: its threads are joined when the interpreter exits, so one call that hangs in dead storage would keep
the agent from ever stopping; and its queue has no bound, so a hung host would collect commands that nobody waits for any more.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from trimtab_protos.errors import Unavailable

T = TypeVar("T")

_QUEUED_PER_THREAD = 16


class WorkerPool:
    """Up to `threads` daemon threads, started when needed. Thread-safe."""

    def __init__(self, name: str, *, threads: int, max_queued: int | None = None) -> None:
        self.name = name
        self.threads = threads
        self._max_queued = threads * _QUEUED_PER_THREAD if max_queued is None else max_queued
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0
        self._unfinished = 0

    @property
    def unfinished(self) -> int:
        """Calls that run or wait."""
        return self._unfinished

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` in a thread. Unavailable(`agent-busy`) where too many wait already; nothing was done then."""
        future: Future[T] = Future()
        with self._lock:
            if self._unfinished >= self.threads + self._max_queued:
                raise Unavailable("agent-busy", f"too many calls wait on this host ({self.name}); try again", pool=self.name)
            self._unfinished += 1
            if self._started < min(self._unfinished, self.threads):
                self._started += 1
                threading.Thread(target=self._run, name=f"{self.name}-{self._started}", daemon=True).start()
            self._queue.put((call, future))
        return future

    def close(self) -> None:
        """End the idle threads; those in a call end with it."""
        with self._lock:
            started, self._started = self._started, 0
        for _ in range(started):
            self._queue.put(None)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            call, future = entry
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(call())
            except BaseException as error:  # noqa: BLE001 belongs to the caller, who gets it through the future
                future.set_exception(error)
            del entry, call, future
            with self._lock:
                self._unfinished -= 1


class InlinePool(WorkerPool):
    """Runs each call at once in the thread that submits it: for calls that only change memory, such as a simulated host's verbs.

    To hand such a call to a thread and its result back costs ten times the call.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, threads=0)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 belongs to the caller, who gets it through the future
            future.set_exception(error)
        return future
