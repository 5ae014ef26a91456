"""What the warden asks of the kernel so that nothing on the host can make it late. Standard library only.

Each right that is not given is said, never silently missed: a warden without it is late under load, which its measured K shows.
"""

import contextlib
import ctypes
import os
import time

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


class ClockRate:
    """Measures how far the clock of leases runs from the machine's bare oscillator, which no time service bends."""

    def __init__(self) -> None:
        self._began = self._both()

    def _both(self) -> tuple[float, float]:
        # Asleep, the bare clock stands still: MONOTONIC is the one that is bent alike and stands still with it.
        return time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_MONOTONIC_RAW)

    def ppm(self) -> int:
        """Return millionths by which the leases' clock is fast (or, negative, slow); 0 within the first ten seconds."""
        bent, raw = (now - then for now, then in zip(self._both(), self._began, strict=True))
        return round((bent / raw - 1) * 1e6) if raw > 10 else 0
