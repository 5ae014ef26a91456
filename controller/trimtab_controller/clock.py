"""The one place that reads clocks and randomness for the controller; tests give another `Clock`."""

import random
import time
from datetime import UTC, datetime
from typing import Protocol

from trimtab_controller.core.ids import new_id


class Clock(Protocol):
    """Wall time for records, boot time for durations and leases (it counts suspend; the wall clock may jump)."""

    def now(self) -> datetime: ...

    def boottime_s(self) -> float: ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def boottime_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)


_rng = random.SystemRandom()


def mint(kind: str) -> str:
    """Return a fresh id of `kind`, now."""
    return new_id(kind, now_ms=time.time_ns() // 1_000_000, rng=_rng)


def system_rng() -> random.Random:
    return _rng
