"""plan.apply: a reviewed plan is carried out, step by step, as child operations of the vms that it moves.

| step   | do                                                                          | undo                                        |
|--------|-----------------------------------------------------------------------------|---------------------------------------------|
| begin  | refuse a plan that is no longer about the fleet as it is; note every step    | open what it shut; the plan is cancelled    |
| carry  | again and again: look after running steps, start those whose turn has come (pivot) | call off what runs, and wait until it ended |
| finish | the plan is applied, or incomplete with the steps that failed                | - past the pivot                            |

A crash leaves rows of steps that name their child operations; the next driver looks at them. Children are ordinary operations: each
can be watched, cancelled and retried by itself. A cancel calls off what runs and waits for it; what has moved stays where it is (a
plan of kind `undo` takes it back), hosts that the plan shut are opened. A step that fails is tried three times, then told; steps
that do not wait for it go on.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.core.model import Actor, PlanStepRow
from trimtab_controller.core.planning.plan import Plan, PlanKind, Step
from trimtab_controller.core.planning.pool_drain import changes as pool_changes
from trimtab_controller.core.planning.staleness import changes
from trimtab_controller.core.planning.timeline import Slots
from trimtab_controller.operations import estates, plan_steps, pool_estates
from trimtab_controller.operations.plan_steps import Course
from trimtab_controller.operations.saga import Json, Saga, Transaction, Wait, transaction
from trimtab_controller.store import events, plans
from trimtab_protos.errors import Conflict

# Children end by themselves; this is how soon the next step starts after one did.
POLL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    plan_id: str
    per_host: int = 2
    per_network: int = 8


def check_fresh(session: Any, plan: Plan, *, now: datetime) -> None:
    """Raise Conflict (`plan-stale`) where what the plan read changed in a way that matters."""
    if plan.kind is PlanKind.DRAIN_POOL:
        found = pool_changes(plan, pool_estates.read_contents(session, plan.scope[0]))
    else:
        found = tuple(change.message for change in changes(plan, estates.read_estate(session, now=now)))
    if found:
        told = "; ".join(found[:4]) + ("; …" if len(found) > 4 else "")
        raise Conflict(
            "plan-stale", f"the fleet changed since the plan was made: {told}; make a new one with `trimtab plan create`"
        )


def _course(context: Transaction[Params], began_at: str) -> Course:
    params, operation = context.params, context.operation
    row = plans.get(context.session, params.plan_id)
    return Course(
        session=context.session,
        plan_id=row.id,
        plan=Plan.from_json(row.changes),
        actor=Actor(name=operation.actor, request_id=operation.request_id),
        slots=Slots(per_host=params.per_host, per_network=params.per_network),
        began_at=datetime.fromisoformat(began_at),
        now=context.now,
    )


def _begin(context: Transaction[Params]) -> Json:
    session, plan_id = context.session, context.params.plan_id
    row = plans.get(session, plan_id)
    plan = Plan.from_json(row.changes)
    if row.operation_id != context.operation.id or row.state != "applying":
        plans.move(session, plan_id, expected={"open"}, state="applying", operation_id=context.operation.id)
        check_fresh(session, plan, now=context.now)
        plans.begin_steps(session, plan_id, plan)
    return {"began_at": context.now.isoformat(), "step_count": len(plan.steps)}


def _unbegin(context: Transaction[Params]) -> None:
    row = plans.get(context.session, context.params.plan_id)
    if row.operation_id != context.operation.id or row.state != "applying":
        return  # it never began, or was undone already
    plan_steps.uncordon_all(_course(context, context.now.isoformat()))
    plans.move(context.session, row.id, expected={"applying"}, state="cancelled")


def _carry(context: Transaction[Params]) -> Json | Wait:
    course = _course(context, context.results["begin"]["began_at"])
    rows = plan_steps.carry_on(course)
    over = [row for row in rows if plan_steps.is_over(row)]
    if len(over) == len(rows):
        return _report(course, rows)
    return Wait(POLL_S, _waiting_for(course, rows), progress=_progress(len(over), len(rows)))


def _uncarry(context: Transaction[Params]) -> Json | Wait:
    begun = context.results.get("begin")
    if begun is None or plan_steps.call_off(_course(context, begun["began_at"])):
        return {}
    return Wait(POLL_S, "moves under way to be called off")


def _finish(context: Transaction[Params]) -> None:
    session, plan_id, report = context.session, context.params.plan_id, context.results["carry"]
    row = plans.get(session, plan_id)
    if row.state == "applying":
        plans.move(session, plan_id, expected={"applying"}, state="incomplete" if report["failed"] else "applied")
        events.append(
            session,
            kind="plan.applied",
            subject_id=plan_id,
            operation_id=context.operation.id,
            actor=context.operation.actor,
            message=f"plan {plan_id}: {report['moved']} moved, {len(report['failed'])} failed",
            now=context.now,
        )


def _report(course: Course, rows: tuple[PlanStepRow, ...]) -> Json:
    steps = course.plan.steps
    return {
        "moved": sum(1 for row in rows if row.state == "done" and steps[row.position].takes_slot),
        "skipped": sum(1 for row in rows if row.state == "skipped"),
        "failed": [
            {"position": row.position, "vm": _subject(steps[row.position]), "message": row.message[:300]}
            for row in rows
            if row.state == "failed"
        ][:100],
    }


def _subject(step: Step) -> str:
    return step.volume_name or step.vm_name


def _waiting_for(course: Course, rows: tuple[PlanStepRow, ...]) -> str:
    names = [_subject(course.plan.steps[row.position]) or row.message for row in rows if row.state in plans.UNDER_WAY]
    return f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}" if names else "steps whose turn has not come"


def _progress(over: int, count: int) -> Json:
    return {"phase": f"{over} of {count} steps", "percent": round(100 * over / max(1, count), 1)}


SAGA = Saga(
    name="plan.apply",
    version=1,
    params=Params,
    result=lambda results: results["carry"],
    steps=(
        transaction("begin", _begin, _unbegin),
        transaction("carry", _carry, _uncarry, pivot=True),
        transaction("finish", _finish, None, because="past the pivot"),
    ),
)
