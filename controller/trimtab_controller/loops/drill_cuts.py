"""Cuts the power of hosts for drills that operators asked for, by the same devices and in the same order as a fence does.

A cut is taken before it is carried out: a leader that dies in between cuts nothing, and nobody cuts twice. What follows is no drill:
failover sees a silent host.
"""

from collections.abc import Callable
from datetime import timedelta

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model.failover import FencePathRow
from trimtab_controller.fencing import Fencer, Power, PowerAnswer
from trimtab_controller.services import fencing
from trimtab_controller.store import events, failover, hosts, leases, power_cuts
from trimtab_controller.store.database import Database, Session
from trimtab_controller.store.power_cuts import PowerCut
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

CUT_TIMEOUT_S = 40.0
GOES_STALE_AFTER = timedelta(seconds=60)
"""Whoever asked waits for it; a cut that nobody could begin for so long would come as a surprise."""


class DrillCuts:
    def __init__(self, *, db: Database, clock: Clock, fencer: Fencer, open_secret: Callable[[str, str], str]) -> None:
        """`open_secret`: sealed secret, place -> secret."""
        self._db, self._clock, self._fencer, self._open_secret = db, clock, fencer, open_secret

    def run(self, term: int) -> None:
        for cut in self._db.read(power_cuts.waiting):
            self._carry_out(term, cut)

    def _carry_out(self, term: int, cut: PowerCut) -> None:
        def take(session: Session) -> bool:
            leases.assert_leader(session, term)
            return power_cuts.take(session, cut.host_id)

        if not self._db.write(take):
            return
        if self._clock.now() - cut.asked_at > GOES_STALE_AFTER:
            self._tell(term, cut, PowerAnswer(power=Power.UNKNOWN, message="nobody could begin it in time; ask again"))
            return
        paths = self._db.read(lambda session: failover.fence_paths(session, cut.host_id))
        answer = PowerAnswer(power=Power.UNKNOWN, message="it has no power device")
        for path in paths:
            answer = self._switch_off(term, cut, path)
            if answer.power is Power.OFF:
                break
        self._tell(term, cut, answer)

    def _switch_off(self, term: int, cut: PowerCut, path: FencePathRow) -> PowerAnswer:
        def may_still() -> bool:
            def work(session: Session) -> bool:
                leases.assert_leader(session, term)
                return hosts.get(session, cut.host_id).connectivity is HostConnectivity.UP

            return bool(self._db.write(work))

        log.info("cutting a host's power for a drill", host_id=cut.host_id, path=path.name, by=cut.asked_by)
        try:
            opened = fencing.opened(path, self._open_secret)
            answer = self._fencer.switch_off(opened, timeout_s=CUT_TIMEOUT_S, may_still=may_still)
        except TrimtabError as error:
            answer = PowerAnswer(power=Power.UNKNOWN, message=error.message)
        metrics.FENCE_ACTIONS.labels(answer.power.value).inc()
        return answer

    def _tell(self, term: int, cut: PowerCut, answer: PowerAnswer) -> None:
        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            is_off = answer.power is Power.OFF
            said = f"has no power: a drill that {cut.asked_by} asked for" if is_off else f"keeps its power: {answer.message}"
            events.append(
                session,
                kind="drill.power_cut" if is_off else "drill.failed",
                subject_id=cut.host_id,
                actor=cut.asked_by,
                message=f"{hosts.get(session, cut.host_id).name} {said}",
                now=self._clock.now(),
            )

        self._db.write(work)
