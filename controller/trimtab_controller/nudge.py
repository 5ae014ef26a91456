"""Nudges: tells workers to look at the table of operations. Carries no work; losing every nudge costs latency, never work."""

import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

# One nudge makes a worker drive until nothing is due, so a few a second are enough for any load.
MIN_INTERVAL_S = 0.05
# After a failed publish the broker is left alone for a while: each try against a dead one costs up to 0.2 s.
PAUSE_AFTER_FAILURE_S = 2.0


class Nudger:
    """Sends at most one nudge per `MIN_INTERVAL_S` from its own thread; `nudge()` never blocks and never fails."""

    def __init__(self, publish: Callable[[], None], *, on_outcome: Callable[[str], None] = lambda _outcome: None) -> None:
        """`publish` sends one message and fails fast (see `tasks.publisher`); `on_outcome` counts: sent, failed."""
        self._publish = publish
        self._on_outcome = on_outcome
        self._wanted = threading.Event()
        self._stopped = threading.Event()
        self._broken_until = 0.0
        self._thread = threading.Thread(target=self._run, name="nudger", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        self._wanted.set()

    @property
    def is_broken(self) -> bool:
        """Tell whether the broker was found dead a moment ago: then the leader drains in process."""
        return time.monotonic() < self._broken_until

    def stop(self) -> None:
        self._stopped.set()
        self._wanted.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            if self._stopped.is_set():
                return
            if self.is_broken:
                self._stopped.wait(self._broken_until - time.monotonic())
                continue
            self._wanted.clear()
            try:
                self._publish()
            except Exception as error:  # noqa: BLE001  # any broker trouble means the same: later
                self._broken_until = time.monotonic() + PAUSE_AFTER_FAILURE_S
                self._wanted.set()
                self._on_outcome("failed")
                log.warning("broker does not take nudges", error=str(error)[:200])
                continue
            self._on_outcome("sent")
            self._stopped.wait(MIN_INTERVAL_S)
