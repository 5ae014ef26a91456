"""How a child tells its supervisor that it lives: a byte in a pipe, about once a second. A frozen child writes none and is killed.

A child that hangs holds leases, locks and a port that its successor needs, so being dead is better than being stuck.
"""

import os
import threading
from collections.abc import Callable

ENVIRONMENT = "TRIMTAB_BEAT_FD"
PERIOD_S = 1.0


def beat_of_process() -> Callable[[], None]:
    """Return what tells the supervisor; does nothing where there is none (a process that systemd started by itself)."""
    given = os.environ.get(ENVIRONMENT)
    if not given:
        return lambda: None
    descriptor = int(given)
    os.set_blocking(descriptor, False)

    def beat() -> None:
        try:
            os.write(descriptor, b".")
        except BlockingIOError:
            return  # the supervisor is behind; the pipe is full of beats
        except BrokenPipeError:
            return  # it is gone; the kernel ends us by PR_SET_PDEATHSIG

    return beat


def beat_from_thread(beat: Callable[[], None]) -> threading.Event:
    """Beat from a thread for a process whose main loop is not ours (Celery's); set the returned event to stop."""
    stopping = threading.Event()

    def run() -> None:
        while not stopping.wait(PERIOD_S):
            beat()

    threading.Thread(target=run, name="beat", daemon=True).start()
    return stopping
