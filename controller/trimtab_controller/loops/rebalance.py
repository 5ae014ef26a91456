"""Rebalances by itself where that was asked for: `advise` keeps a plan for review, `automatic` applies it too.

One plan at a time: while one is open or under way nothing new is planned, so that two never fight over the same vms. Advice that nobody
took in time, or that the fleet has outgrown, makes room for the next.
"""

from datetime import datetime, timedelta

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.model import Actor, PlanRow
from trimtab_controller.core.planning.plan import Plan, PlanKind
from trimtab_controller.core.planning.rebalance import RebalanceMode
from trimtab_controller.core.planning.staleness import changes
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.estates import read_estate
from trimtab_controller.services import plans
from trimtab_controller.services.plans import PlanWish
from trimtab_controller.store import keyset, leases
from trimtab_controller.store import plans as plan_rows
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Conflict

log = structlog.get_logger(__name__)

SYSTEM = Actor(name="system:rebalance")
ADVICE_LASTS = timedelta(days=1)
"""The loads that advice was made from say little of the next day."""


class Rebalance:
    def __init__(self, *, db: Database, clock: Clock, nudger: Nudger, mode: RebalanceMode) -> None:
        self._db, self._clock, self._nudger, self._mode = db, clock, nudger, mode

    def run(self, term: int) -> None:
        """Plan once; keep or apply what pays for itself."""
        now = self._clock.now()
        if self._mode is RebalanceMode.OFF or self._db.read(lambda session: _is_pending(session, now=now)):
            return
        inputs = self._db.read(lambda session: plans.gather(session, PlanWish(kind=PlanKind.REBALANCE), now=now))
        plan = plans.decide(inputs)
        if plan.is_empty:
            metrics.REBALANCE_PLANS.labels("nothing-to-do").inc()
            return

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            for advice in _of(session, "open"):
                if advice.created_by == SYSTEM.name:
                    plans.delete(session, advice.id)
            view = plans.keep(session, plan, actor=SYSTEM, now=now)
            if self._mode is RebalanceMode.AUTOMATIC:
                plans.apply(session, view.row.id, actor=SYSTEM, now=now)

        try:
            self._db.write(work)
        except Conflict as stale:
            log.info("rebalance overtaken", code=stale.code)
            metrics.REBALANCE_PLANS.labels("overtaken").inc()
            return
        metrics.REBALANCE_PLANS.labels(self._mode.value).inc()
        self._nudger.nudge()


def _is_pending(session: Session, *, now: datetime) -> bool:
    if _of(session, "applying"):
        return True
    young = [row for row in _of(session, "open") if row.created_by != SYSTEM.name or now - row.created_at <= ADVICE_LASTS]
    if not young:
        return False
    estate = read_estate(session, now=now)
    return any(not changes(Plan.from_json(row.changes), estate) for row in young)


def _of(session: Session, state: str) -> tuple[PlanRow, ...]:
    page = keyset.Page(limit=100, order_by="id", filters={"kind": PlanKind.REBALANCE.value, "state": state})
    return plan_rows.page(session, page)[0]
