"""One clock for the controller, the agents and the simulated hosts, which only moves when a test moves it."""

import heapq
import itertools
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
# Boot was a while ago, so that a zero in a record is never a time.
BOOTED_BEFORE_S = 1000.0


class VirtualClock:
    """Implements both `trimtab_controller.clock.Clock` and `trimtab_agent.clock.Clock`. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._elapsed_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._sleepers: dict[int, float] = {}

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self._elapsed_s)

    def now_ms(self) -> int:
        return int(self.now().timestamp() * 1000)

    def boottime_s(self) -> float:
        return BOOTED_BEFORE_S + self._elapsed_s

    def sleep(self, seconds: float) -> None:
        """Block until somebody moves the clock that far."""
        with self._changed:
            until_s = self._elapsed_s + seconds
            number = next(self._order)
            self._sleepers[number] = until_s
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._elapsed_s >= until_s)
            del self._sleepers[number]

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (self._elapsed_s + delay_s, next(self._order), callback))

    def advance(self, seconds: float) -> None:
        """Move on, waking sleepers and making the calls that fall due, in their order."""
        with self._changed:
            end_s = self._elapsed_s + seconds
        while True:
            with self._changed:
                if not self._due or self._due[0][0] > end_s:
                    self._elapsed_s = max(self._elapsed_s, end_s)
                    self._changed.notify_all()
                    return
                at_s, _, callback = heapq.heappop(self._due)
                self._elapsed_s = max(self._elapsed_s, at_s)
                self._changed.notify_all()
            callback()

    def advance_to(self, instant: datetime) -> None:
        """Move on to `instant`; nothing where it is past."""
        self.advance(max(0.0, (instant - self.now()).total_seconds()))

    def next_wake_s(self) -> float | None:
        """Return in how many seconds the first sleeper wakes; None while nobody sleeps."""
        with self._changed:
            waking = [until_s - self._elapsed_s for until_s in self._sleepers.values() if until_s > self._elapsed_s]
            return min(waking) if waking else None
