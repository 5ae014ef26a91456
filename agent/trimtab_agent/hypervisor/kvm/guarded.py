"""Calls that may hang for ever (a dead NFS server), made so that only their own thread hangs.

A thread stuck in the kernel cannot be ended. So there is one per key at most, and calls for a key take turns: while one hangs, the
others wait their time limit and fail, and no thread is made for them.
"""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Hung(Exception):
    """The call did not return in time, or an earlier one for the same key still has not."""


class _Call(Generic[T]):
    def __init__(self, function: Callable[[], T], turn: threading.Lock) -> None:
        self._function = function
        self._turn = turn
        self._done = threading.Event()
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
            self._error = error
        finally:
            self._turn.release()
            self._done.set()

    def result(self, timeout_s: float) -> T:
        if not self._done.wait(timeout_s):
            raise Hung
        if self._error is not None:
            raise self._error
        return self._results[0]


class GuardedCalls:
    """Runs functions with a time limit, one thread per key at most. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}

    def run(self, key: str, function: Callable[[], T], *, timeout_s: float) -> T:
        """Return what `function` returns. Hung: it did not in `timeout_s`, the wait for its turn included."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        if not turn.acquire(timeout=timeout_s):
            raise Hung
        call = _Call(function, turn)
        threading.Thread(target=call.run, name=f"guarded-{key}", daemon=True).start()
        return call.result(max(0.0, deadline - time.monotonic()))
