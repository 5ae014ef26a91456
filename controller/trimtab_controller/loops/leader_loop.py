"""What every periodic job of the leader looks like, and the clock that runs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Job:
    """Runs `run(term)` every `period_s` while this process leads; a failure is logged and tried again at the next period."""

    name: str
    period_s: float
    run: Callable[[int], None]
    _due: float = field(default=0.0)

    def due_in_s(self, clock: Clock) -> float:
        """Return the seconds until it is due, 0 where it is."""
        return max(0.0, self._due - clock.boottime_s())

    def run_if_due(self, term: int, clock: Clock) -> None:
        now = clock.boottime_s()
        if now < self._due:
            return
        self._due = now + self.period_s
        try:
            with metrics.LOOP_SECONDS.labels(self.name).time():
                self.run(term)
        except TrimtabError as error:
            metrics.LOOP_FAILURES.labels(self.name).inc()
            log.warning("leader job put off", job=self.name, code=error.code, error=error.message)
        except Exception:
            metrics.LOOP_FAILURES.labels(self.name).inc()
            log.exception("leader job failed", job=self.name)


def run_due(jobs: Sequence[Job], term: int, clock: Clock) -> None:
    for job in jobs:
        job.run_if_due(term, clock)
