"""A clock that stands still until a test moves it."""

import threading
from collections.abc import Callable


class ManualClock:
    def __init__(self, *, boottime_s: float = 1000.0, now_ms: int = 1_800_000_000_000) -> None:
        self._lock = threading.Lock()
        self._boottime_s = boottime_s
        self._now_ms = now_ms
        self._due: list[tuple[float, Callable[[], None]]] = []

    def now_ms(self) -> int:
        return self._now_ms

    def boottime_s(self) -> float:
        return self._boottime_s

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        with self._lock:
            self._due.append((self._boottime_s + delay_s, callback))

    def advance(self, seconds: float) -> None:
        with self._lock:
            self._boottime_s += seconds
            self._now_ms += int(seconds * 1000)
            ripe = [callback for due_s, callback in self._due if due_s <= self._boottime_s]
            self._due = [entry for entry in self._due if entry[0] > self._boottime_s]
        for callback in ripe:
            callback()
