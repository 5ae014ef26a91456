"""recovery.run: a recovery plan carried out: group after group comes back from a repository, as far as each shows what is awaited.

| step   | do                                                                         | undo                                             |
|--------|----------------------------------------------------------------------------|--------------------------------------------------|
| own    | write down which backup each vm comes back from, and what it loses by that   | cancel what is under way; vms that are back stay |
| bring  | wait: the leader's loop accepts each group's restores, or boot tests, in turn | - `own` undoes                                   |
| finish | what came back, how long it took, what was lost                              | - last                                           |

The state of a run is the plan's `last_run`; each change of it is one transaction on the plan's row (`loops/recoveries.py`), so a crash
anywhere goes on from there. Restores and boot tests are operations of their own, with their own undo: a run that is cancelled cancels
them, and a boot test leaves nothing.
"""

from dataclasses import dataclass

from trimtab_controller.core.recovery_plans import POLL_S, Mode, Outcome
from trimtab_controller.operations import recovery_runs
from trimtab_controller.operations.saga import Json, Saga, Transaction, Wait, transaction
from trimtab_controller.store import events, operations, recovery_plans


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    plan_id: str
    mode: str = "test"


def _own(context: Transaction[Params]) -> None:
    plan = recovery_plans.lock(context.session, context.params.plan_id)
    run = recovery_runs.planned(context.session, plan, mode=Mode(context.params.mode), now=context.now)
    recovery_runs.begin(context.session, plan, run, context.operation, mode=context.params.mode)


def _stop(context: Transaction[Params]) -> Wait | None:
    """Cancel what is under way and wait for its end, so that nothing of a test is left behind when this has ended."""
    plan = recovery_plans.lock(context.session, context.params.plan_id)
    if not recovery_runs.is_of(plan, context.operation.id):
        return None
    run, running = recovery_runs.followed(context.session, plan, now=context.now), []
    for one in (one for group in run.groups for one in group.vms if one.outcome is Outcome.RUNNING):
        operation = operations.get(context.session, one.operation_id)
        if operation.ended_at is None:
            running.append(one.vm)
            if not operation.is_cancel_requested:
                operations.request_cancel(context.session, operation.id, actor=context.operation.actor, now=context.now)
    recovery_runs.write(context.session, plan, run, state="cancelled", problem="it was cancelled")
    return Wait(POLL_S, f"{', '.join(running[:5])} to end") if running else None


def _bring(context: Transaction[Params]) -> Json | Wait:
    run = recovery_plans.get(context.session, context.params.plan_id).last_run
    if run.get("state") == "running":
        return Wait(POLL_S, str(run.get("waits_for") or "the leader to begin the next group"))
    return {"state": run.get("state", ""), "problem": run.get("problem", "")}


def _finish(context: Transaction[Params]) -> Json:
    plan = recovery_plans.get(context.session, context.params.plan_id)
    run, brought = recovery_runs.run_from(plan.last_run), context.results["bring"]
    vms = [one for group in run.groups for one in group.vms]
    back = [one for one in vms if one.outcome is Outcome.BACK]
    told = {
        "mode": context.params.mode,
        "state": brought["state"],
        "problem": brought["problem"],
        "back": len(back),
        "present": sum(one.outcome is Outcome.PRESENT for one in vms),
        "missing": sum(one.outcome not in {Outcome.BACK, Outcome.PRESENT} for one in vms),
        "took_ms": int((context.now - context.operation.created_at).total_seconds() * 1000),
        "loss_window_s": max((one.loss_window_s for one in back), default=0.0),
    }
    why = f": {told['problem']}" if told["problem"] else ""
    events.append(
        context.session,
        kind="recovery.ended",
        project_id=plan.project_id,
        subject_id=plan.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"recovery plan {plan.name} ({told['mode']}): {told['back']} vms came back in {told['took_ms'] / 1000:.0f} s, "
        f"{told['missing']} are missing{why}"[:1000],
        now=context.now,
    )
    return told


SAGA = Saga(
    name="recovery.run",
    version=1,
    params=Params,
    result=lambda results: results["finish"],
    steps=(
        transaction("own", _own, _stop),
        transaction("bring", _bring, None, because="the undo of `own` cancels what is under way"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
