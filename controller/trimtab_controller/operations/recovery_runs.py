"""Runs of recovery plans between rows and the pure core."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

from trimtab_controller.core import recovery_plans as core
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation, RecoveryPlan
from trimtab_controller.core.recovery_plans import Awaits, Copy, Group, GroupRun, Mode, Outcome, Run, VmRun
from trimtab_controller.store import backups, operations, recovery_plans
from trimtab_controller.store.database import Session


def groups_of(plan: RecoveryPlan) -> tuple[Group, ...]:
    return groups_from(plan.groups)


def groups_from(written: Sequence[Mapping[str, Any]]) -> tuple[Group, ...]:
    """Return groups as `group_json` wrote them."""
    return tuple(Group(**{**group, "awaits": Awaits(group["awaits"])}) for group in written)


def group_json(group: Group) -> dict[str, Any]:
    written = {**asdict(group), "vms": list(group.vms), "awaits": group.awaits.value}
    if not group.tcp:
        del written["tcp"]  # a leader of an earlier release does not know it
    return written


def planned(session: Session, plan: RecoveryPlan, *, mode: Mode, now: datetime) -> Run:
    """Return the run before its first step, from what the repository is known to list now."""
    copies = [
        Copy(
            backup_id=one.id,
            vm_name=one.vm_name,
            taken_at=one.taken_at or one.created_at,
            is_damaged=one.state == "damaged",
            level=one.level,
        )
        for one in backups.of_repo(session, plan.repo_id)
        if one.state in backups.LISTED and one.project_id == plan.project_id
    ]
    groups = groups_of(plan)
    present = recovery_plans.vms_present(session, plan.project_id, [vm for group in groups for vm in group.vms])
    return core.begin(groups, copies, present, mode=mode, now=now)


def begin(session: Session, plan: RecoveryPlan, run: Run, operation: Operation, *, mode: str) -> None:
    """Write down a run before its first step."""
    about = {"operation_id": operation.id, "mode": mode, "began_at": operation.created_at.isoformat()}
    recovery_plans.update(session, plan.id, last_run={**about, "state": "running", "problem": "", "waits_for": "", **_json(run)})


def write(session: Session, plan: RecoveryPlan, run: Run, *, state: str, problem: str = "", waits_for: str = "") -> None:
    """Write down where the plan's run is."""
    told = {"state": state, "problem": problem[:1000], "waits_for": waits_for[:200]}
    recovery_plans.update(session, plan.id, last_run={**plan.last_run, **told, **_json(run)})


def is_of(plan: RecoveryPlan, operation_id: str) -> bool:
    return bool(plan.last_run.get("operation_id") == operation_id)


def followed(session: Session, plan: RecoveryPlan, *, now: datetime) -> Run:
    """Return the plan's run with what became of the operations that it waits for."""
    run = run_from(plan.last_run)
    for i, group in enumerate(run.groups):
        vms = [_seen(session, one) if one.outcome is Outcome.RUNNING else one for one in group.vms]
        run = core.with_vms(run, i, vms, now=now)
    return run


def _seen(session: Session, one: VmRun) -> VmRun:
    operation = operations.get(session, one.operation_id)
    if operation.ended_at is None and operation.state is not OperationState.NEEDS_ATTENTION:
        return one
    if operation.state is not OperationState.DONE:
        why = operation.error.message if operation.error is not None else f"its operation is {operation.state.value}"
        return replace(one, outcome=Outcome.FAILED, problem=why[:400])
    result = operation.result or {}
    took_ms, problem = int(result.get("recovery_ms") or 0), str(result.get("problem") or "")[:400]
    if not took_ms and operation.ended_at is not None:
        took_ms = int((operation.ended_at - operation.created_at).total_seconds() * 1000)
    return replace(one, outcome=Outcome.FAILED if problem else Outcome.BACK, recovery_ms=took_ms, problem=problem)


def _json(run: Run) -> dict[str, Any]:
    groups = [
        {
            "name": group.name,
            "ended_at": group.ended_at.isoformat() if group.ended_at is not None else "",
            "vms": [{**asdict(one), "outcome": one.outcome.value} for one in group.vms],
        }
        for group in run.groups
    ]
    return {"groups": groups}


def run_from(written: Mapping[str, Any]) -> Run:
    return Run(
        groups=[
            GroupRun(
                name=group["name"],
                ended_at=datetime.fromisoformat(group["ended_at"]) if group["ended_at"] else None,
                vms=[VmRun(**{**one, "outcome": Outcome(one["outcome"])}) for one in group["vms"]],
            )
            for group in written.get("groups", ())
        ]
    )
