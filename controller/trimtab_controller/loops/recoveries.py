"""Recovery plans at work: the leader brings the next group back where the one before shows what was awaited of it.

Each look at a run is one transaction on its plan's row; what is accepted are operations like anybody else's, whose names the same
transaction writes down. So a leader that dies between two looks is followed by one that goes on from the row.
"""

from dataclasses import replace

import structlog

from trimtab_controller.clock import Clock
from trimtab_controller.core import recovery_plans as core
from trimtab_controller.core.model import Actor, Operation, RecoveryPlan
from trimtab_controller.core.recovery_plans import Group, Mode, Outcome, VmRun
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations import recovery_runs
from trimtab_controller.services import recovery_plans as service
from trimtab_controller.store import identity, leases, operations, recovery_plans
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import NotFound, TrimtabError

log = structlog.get_logger(__name__)


class RecoveryLoop:
    def __init__(self, *, db: Database, clock: Clock, nudger: Nudger) -> None:
        self._db, self._clock, self._nudger = db, clock, nudger

    def run(self, term: int) -> None:
        """Take every run that goes on as far as it can be taken now."""
        begun = [plan.id for plan in self._db.read(recovery_plans.running) if self._take_on(term, plan)]
        if begun:
            self._nudger.nudge()

    def _take_on(self, term: int, found: RecoveryPlan) -> bool:
        now = self._clock.now()

        def work(session: Session) -> bool:
            leases.assert_leader(session, term)
            plan = recovery_plans.lock(session, found.id)
            if plan.last_run.get("state") != "running":
                return False
            operation = operations.get(session, str(plan.last_run["operation_id"]))
            if operation.ended_at is not None or operation.is_cancel_requested:
                return False
            groups, run = recovery_runs.groups_of(plan), recovery_runs.followed(session, plan, now=now)
            match core.next_step(groups, run, now=now):
                case core.Begin(group=group):
                    vms = [self._begun(session, plan, groups[group], one, operation) for one in run.groups[group].vms]
                    run = core.with_vms(run, group, vms, now=now)
                    recovery_runs.write(session, plan, run, state="running", waits_for=f"group {groups[group].name}")
                    return True
                case core.Pause(why=why):
                    recovery_runs.write(session, plan, run, state="running", waits_for=why)
                    return False
                case core.Over(problem=problem):
                    recovery_runs.write(session, plan, run, state="stopped" if problem else "done", problem=problem)
                    return True

        return self._db.write(work)

    def _begun(self, session: Session, plan: RecoveryPlan, group: Group, one: VmRun, run: Operation) -> VmRun:
        if one.outcome is not Outcome.WAITING:
            return one
        mode, project = Mode(str(run.params["mode"])), identity.find_project(session, plan.project_id)
        try:
            if project is None:
                raise NotFound("project-not-found", "its project is gone")
            with session.begin_nested():
                operation = service.accept_one(
                    session, plan, group, one, mode=mode, project=project, actor=Actor(name=run.actor), now=self._clock.now()
                )
        except TrimtabError as refused:
            log.info("not brought back", plan_id=plan.id, vm=one.vm, code=refused.code, error=refused.message)
            return core.failed(one, refused.message)
        return replace(one, outcome=Outcome.RUNNING, operation_id=operation.id)
