"""The one place that reads clocks for the agent; tests and simulated hosts give another `Clock`."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Wall time for records, boot time for leases and durations: it counts suspend, and nobody can set it."""

    def now_ms(self) -> int:
        """Return the wall clock, milliseconds since the Unix epoch."""

    def boottime_s(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call once after the delay, from a thread of the clock's own; the callback must be short."""


class SystemClock:
    """The machine's clocks. Its timer thread starts with the first `call_later` and sleeps while nothing is due."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._is_started = False

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def boottime_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (self.boottime_s() + delay_s, next(self._order), callback))
            if not self._is_started:
                self._is_started = True
                threading.Thread(target=self._run, name="clock", daemon=True).start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > self.boottime_s():
                    self._changed.wait(self._due[0][0] - self.boottime_s() if self._due else None)
                _, _, callback = heapq.heappop(self._due)
            callback()
