"""Keeps the gauges of what the doctor finds. What only gateways hear (clocks) has gauges of its own there."""

from collections.abc import Callable

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.doctor import KINDS, Severity
from trimtab_controller.core.doctor.facts import UncoveredFacts
from trimtab_controller.services import doctor
from trimtab_controller.store.database import Database


class Doctor:
    def __init__(self, *, db: Database, clock: Clock, uncovered: Callable[[], tuple[UncoveredFacts, ...]]) -> None:
        """`uncovered`: what the failover proof last said, which is kept along elsewhere."""
        self._db, self._clock, self._uncovered = db, clock, uncovered

    def run(self, _term: int) -> None:
        """Examine the fleet; set every gauge, zeros included, so that what was cured is seen to be."""
        facts = self._db.read(lambda session: doctor.read(session, now=self._clock.now()))
        counts = doctor.counted(doctor.judge(facts, uncovered=self._uncovered()))
        for kind in KINDS:
            for severity in Severity:
                metrics.DOCTOR_FINDINGS.labels(severity.value, kind).set(counts.get((severity.value, kind), 0))
