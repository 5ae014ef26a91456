"""What the warden asks of the kernel so that nothing on the host can make it late. Standard library only.

Each right that is not given is said, never silently missed: a warden without it is late under load, which its measured K shows.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable

MCL_CURRENT, MCL_FUTURE = 1, 2
PRIORITY = 50
"""Above every ordinary process and below the kernel's own threads of that class."""
OOM_NEVER = "-1000"


def take() -> tuple[str, ...]:
    """Ask for all of them; return what was refused, in words."""
    refused = []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE):
        refused.append(f"memory is not locked ({os.strerror(ctypes.get_errno())})")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | getattr(os, "SCHED_RESET_ON_FORK", 0x40000000), os.sched_param(PRIORITY))
    except OSError as error:
        refused.append(f"no real-time priority ({error.strerror})")
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(OOM_NEVER)
    except OSError as error:
        refused.append(f"the kernel may choose it when memory runs out ({error.strerror})")
    return tuple(refused)


def become_ordinary() -> None:
    """Give the priority back, in a child that does slow work for the warden."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


RATE_WINDOW_S = 15.0
RATE_LIMIT_PPM = 5_000
"""Half of what the wait for a lease allows a clock (rho, a hundredth): beyond it nobody may count on this host to end in time."""
_AT_ONCE_S = 0.001
_TRIES = 20


def _both_clocks() -> tuple[float, float]:
    """Return both clocks. Asleep, the bare one stands still: MONOTONIC is bent like the leases' and stands still with it."""
    for _try in range(_TRIES):
        bent = time.clock_gettime(time.CLOCK_MONOTONIC)
        raw = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
        if time.clock_gettime(time.CLOCK_MONOTONIC) - bent <= _AT_ONCE_S:
            break  # else somebody held us between the two
    return bent, raw


class ClockRate:
    """Measures how far the clock of leases runs from the machine's bare oscillator, which no time service bends.

    Over the last quarter to half of a minute, about a lease: chrony may bend the clock by a twelfth while it makes an offset good.
    """

    def __init__(self, both: Callable[[], tuple[float, float]] = _both_clocks) -> None:
        """`both` reads the bent clock and the bare one at the same instant, seconds."""
        self._both = both
        self._older = self._newer = both()

    def ppm(self) -> int:
        """Return millionths by which the leases' clock is fast (or, negative, slow); 0 within the first ten seconds."""
        now = self._both()
        bent, raw = (here - then for here, then in zip(now, self._older, strict=True))
        if now[1] - self._newer[1] >= RATE_WINDOW_S:
            self._older, self._newer = self._newer, now
        return round((bent / raw - 1) * 1e6) if raw > 10 else 0
