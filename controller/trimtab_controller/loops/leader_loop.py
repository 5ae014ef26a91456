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
    """Runs `run(term)` every `period_s` while this process leads; a failure is logged and tried again at the next period.

    While `is_urgent` it runs every `urgent_period_s`, and never for more than half of the time: where a round is long, its period stays.
    """

    name: str
    period_s: float
    run: Callable[[int], None]
    is_urgent: Callable[[], bool] | None = None
    urgent_period_s: float = 0.25
    only_looks: bool = False
    """It changes nothing and asks no host for anything, so that it goes on while the database is behind the fleet."""
    _due: float = field(default=0.0)
    _soonest: float = field(default=0.0)

    def due_in_s(self, clock: Clock) -> float:
        """Return the seconds until it is due, 0 where it is."""
        due = self._due
        if self.is_urgent is not None and self._soonest < due and self.is_urgent():
            due = self._soonest
        return max(0.0, due - clock.boottime_s())

    def run_if_due(self, term: int, clock: Clock) -> None:
        if self.due_in_s(clock) > 0:
            return
        now = clock.boottime_s()
        self._due = now + self.period_s
        try:
            self._run(term)
        finally:
            ended = clock.boottime_s()
            self._soonest = max(now + self.urgent_period_s, ended + (ended - now))

    def _run(self, term: int) -> None:
        try:
            with metrics.LOOP_SECONDS.labels(self.name).time():
                self.run(term)
        except TrimtabError as error:
            metrics.LOOP_FAILURES.labels(self.name).inc()
            log.warning("leader job put off", job=self.name, code=error.code, error=error.message)
        except Exception:
            metrics.LOOP_FAILURES.labels(self.name).inc()
            log.exception("leader job failed", job=self.name)


def run_due(jobs: Sequence[Job], term: int, clock: Clock, *, is_behind: bool = False) -> None:
    """Run what is due; `is_behind`: only what changes nothing."""
    for job in jobs:
        if job.only_looks or not is_behind:
            job.run_if_due(term, clock)
