"""Carries out the steps of one plan: which may start, how the running ones stand, how they are called off.

Every function works inside one transaction of the saga `plan.apply` and may run twice. A step that moves a vm is a child operation
of that vm; the row of the step names it, so that a new driver goes on where the last one stopped. Steps are checked again when
their turn comes: a vm that left by itself or is stopped leaves nothing to do.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from trimtab_controller.core.lifecycle import ENDED_STATES, DesiredPower, HostConnectivity, OperationState
from trimtab_controller.core.model import Actor, Operation, PlanStepRow, Vm
from trimtab_controller.core.planning.estate import DrainPolicy
from trimtab_controller.core.planning.plan import Plan, PlanKind, Step, StepKind
from trimtab_controller.core.planning.surprises import surprise
from trimtab_controller.core.planning.timeline import Slots
from trimtab_controller.operations import volume_plan_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.estates import read_networks
from trimtab_controller.store import failover, fleet, hosts, operations, plans, reach, vm_listing, vms
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict

# A migration fails for passing reasons too: a guest too busy to converge, a host that restarted its agent.
TRIES_MAX = 3
_OVER = frozenset({"done", "skipped", "failed", "cancelled"})
_PASSED = frozenset({"done", "skipped"})
STOP_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One look at a plan that is being applied."""

    session: Session
    plan_id: str
    plan: Plan
    actor: Actor
    slots: Slots
    began_at: datetime
    now: datetime

    @property
    def is_late(self) -> bool:
        return self.plan.deadline_s is not None and (self.now - self.began_at).total_seconds() > self.plan.deadline_s

    def rows(self) -> tuple[PlanStepRow, ...]:
        return plans.steps_of(self.session, self.plan_id)

    def put(self, row: PlanStepRow, state: str, **values: Any) -> None:
        plans.set_step(self.session, row, state=state, **values)


def carry_on(course: Course) -> tuple[PlanStepRow, ...]:
    """Look after what runs, start what may start, and return the steps as they are then."""
    for row in course.rows():
        if row.state in plans.UNDER_WAY:
            _look_after(course, row)
    states = {row.position: row.state for row in course.rows()}
    slots = replace(course.slots, network_of=read_networks(course.session))
    # Of all plans.
    taken = Counter(key for ends in plans.moves_under_way(course.session).between for key in slots.between(*ends))
    for row in course.rows():
        step = course.plan.steps[row.position]
        if row.state != "pending":
            continue
        before = [states[position] for position in step.after]
        if any(state in _OVER - _PASSED for state in before):
            course.put(row, "failed", message="a step that it waits for failed")
        elif course.is_late:
            course.put(row, "failed", message="the deadline passed before its turn came")
        elif all(state in _PASSED for state in before) and (not step.takes_slot or _has_slot(slots, step, taken)):
            is_begun = _start(course, row, step)
            taken.update(slots.keys(step) if is_begun else ())
        states[row.position] = next(one.state for one in course.rows() if one.position == row.position)
    return course.rows()


def call_off(course: Course) -> bool:
    """Cancel what runs and drop what has not begun; return whether nothing is under way any more."""
    is_quiet = True
    for row in course.rows():
        if row.state == "pending":
            course.put(row, "cancelled", message="the plan was cancelled")
        elif row.state in plans.UNDER_WAY:
            is_quiet &= _call_off_one(course, row)
    return is_quiet


def uncordon_all(course: Course) -> None:
    """Open the hosts that this plan shut."""
    for row in course.rows():
        if course.plan.steps[row.position].kind is StepKind.CORDON and row.state == "done":
            if row.message != WAS_CORDONED:
                reach.set_cordon(course.session, row.host_id, is_cordoned=False)
            course.put(row, "cancelled", message="uncordoned again")
    plans.end_holds_of(course.session, course.plan_id)


def is_over(row: PlanStepRow) -> bool:
    return row.state in _OVER


WAS_CORDONED = "it was cordoned already"


# --- starting ----------------------------------------------------------------------------------------------------------------


def _has_slot(slots: Slots, step: Step, taken: Mapping[str, int]) -> bool:
    return all(taken.get(key, 0) < slots.count(key) for key in slots.keys(step))


def _start(course: Course, row: PlanStepRow, step: Step) -> bool:
    """Begin a step whose turn has come; return whether a move is under way now."""
    match step.kind:
        case StepKind.CORDON if course.plan.kind is PlanKind.UPGRADE and (why := _surprise(course)):
            # The host before is open again by now: in a fleet that has just lost something, no host is taken out as well.
            message = f"{why}: this goes on when that is over; `trimtab plan cancel {course.plan_id}` ends it here"
            if row.message != message:
                course.put(row, "pending", message=message)
        case StepKind.CORDON:
            was = reach.set_cordon(course.session, step.host_id, is_cordoned=True)
            course.put(row, "done", message=WAS_CORDONED if was else "")
        case StepKind.UNCORDON:
            reach.set_cordon(course.session, step.host_id, is_cordoned=False)
            course.put(row, "done")
        case StepKind.HOLD:
            return _hold(course, row, step)
        case StepKind.MIGRATE | StepKind.RESTART:
            return _start_move(course, row, step)
        case StepKind.MOVE_VOLUME:
            return volume_plan_steps.start(course, row, step)
        case StepKind.RECOVER:
            course.put(row, "failed", message="a recovery is driven by the failover of its host, not by a plan")
    return False


def _hold(course: Course, row: PlanStepRow, step: Step) -> bool:
    """Hold a host that is empty; return whether a vm is on its way from one that is not.

    Since the plan was made vms may have come: new ones, and those of the hosts before, for which the scheduler found no better place. Whom
    the plan told as a blocker the operator knows of.
    """
    known = {blocker.vm_id for blocker in course.plan.blockers if blocker.host_id == step.host_id}
    came = [vm for vm in vm_listing.to_leave(course.session, step.host_id) if vm.id not in known]
    if came:
        return _send_on(course, row, came[0])
    plans.hold_host(
        course.session, step.host_id, plan_id=course.plan_id, was_cordoned=False, created_by=course.actor.name, now=course.now
    )
    name = fleet.name_of(course.session, step.host_id)
    course.put(row, "running", message=f"end it with `trimtab host maintenance end {name}`")
    return False


def _send_on(course: Course, row: PlanStepRow, vm: Vm) -> bool:
    live = operations.live_exclusive(course.session, vm.id)
    if live is not None:
        course.put(row, "pending", message=f"waits for {live.kind} {live.id} of vm {vm.name}, which came since the plan was made")
        return False
    if vm.drain_policy == DrainPolicy.WAIT:
        course.put(row, "pending", message=f"waits: vm {vm.name} came since the plan was made and waits for you; stop or move it")
        return False
    child = _child(course, row, vm, "vm.migrate", {"to_host_id": ""})
    if child is not None:
        course.put(row, "running", operation_id=child.id, message=f"vm {vm.name} came since the plan was made, and moves on")
    return child is not None


def _surprise(course: Course) -> str:
    silent, steps = hosts.silent(course.session), zip(course.rows(), course.plan.steps, strict=True)
    moved = [step.vm_id for row, step in steps if step.moves_vm and row.state == "done"]
    return surprise(
        silent,
        vm_listing.by_ids(course.session, moved),
        began_at=course.began_at,
        held=plans.maintenance_of(course.session, [host.id for host in silent]),
        frozen=failover.control(course.session).frozen,
    )


def _start_move(course: Course, row: PlanStepRow, step: Step) -> bool:
    vm = vms.get(course.session, step.vm_id)
    reason = _nothing_to_do(vm, step)
    if reason:
        course.put(row, "skipped", message=reason)
        return False
    live = operations.live_exclusive(course.session, vm.id)
    if live is not None:
        course.put(row, "pending", message=f"waits for {live.kind} {live.id}")
        return False
    if step.kind is StepKind.RESTART:
        child = _child(course, row, vm, "vm.stop", {"force": False, "timeout_s": STOP_TIMEOUT_S})
        if child is not None:
            vms.set_desired(course.session, vm.id, DesiredPower.STOPPED)
            course.put(row, "stopping", operation_id=child.id, message="")
    else:
        child = _child(course, row, vm, "vm.migrate", {"to_host_id": step.target_host_id if step.is_target_fixed else ""})
        if child is not None:
            course.put(row, "running", operation_id=child.id, message="")
    return child is not None


def _nothing_to_do(vm: Vm, step: Step) -> str:
    if vm.deleted_at is not None:
        return "it was deleted meanwhile"
    if vm.host_id != step.host_id:
        return "it left by itself"
    if vm.desired_power is DesiredPower.STOPPED:
        return "it was stopped meanwhile"
    return ""


def _child(course: Course, row: PlanStepRow, vm: Vm, kind: str, params: Mapping[str, Any]) -> Operation | None:
    """Accept the operation of a step; None where something else goes first, which the step then says: the next look asks again.

    What refuses ends by itself: a backup that began after the plan was made, disks that are still filled or settled.
    """
    try:
        with course.session.begin_nested():
            return accept(
                course.session,
                kind,
                subject_id=vm.id,
                subject_name=vm.name,
                project_id=vm.project_id,
                params={"vm_id": vm.id, **params},
                actor=course.actor,
                now=course.now,
            )
    except Conflict as refused:
        course.put(row, row.state, message=f"waits: {refused.message}")
        return None


# --- following ---------------------------------------------------------------------------------------------------------------


def _look_after(course: Course, row: PlanStepRow) -> None:
    step = course.plan.steps[row.position]
    if step.kind is StepKind.HOLD and not row.operation_id:
        if not plans.maintenance_of(course.session, [step.host_id]):
            _end_hold(course, row)
        return
    child = operations.get(course.session, row.operation_id)
    if child.state is OperationState.NEEDS_ATTENTION:
        course.put(row, "failed", message=f"{child.kind} {child.id} needs attention: {_why(child)}")
    elif child.state in ENDED_STATES:
        _take_end(course, row, step, child)


def _end_hold(course: Course, row: PlanStepRow) -> None:
    """Go on once the host is back: one that did not survive its maintenance is the surprise at which a tour stops."""
    away = [host for host in hosts.live(course.session, [row.host_id]) if host.connectivity is not HostConnectivity.UP]
    if not away:
        course.put(row, "done", message="the maintenance was ended")
        return
    (host,) = away
    message = (
        f"the maintenance was ended, but {host.name} is {host.connectivity.value}: this goes on when it is up; "
        f"`trimtab plan cancel {course.plan_id}` ends it here"
    )
    if row.message != message:
        course.put(row, "running", message=message)


def _take_end(course: Course, row: PlanStepRow, step: Step, child: Operation) -> None:
    is_done = child.state is OperationState.DONE
    if step.kind is StepKind.HOLD and is_done:
        course.put(row, "pending", operation_id="", message="")
        return
    if row.state == "stopping":
        if is_done:
            _start_again(course, row, step)
        else:
            vms.set_desired(course.session, step.vm_id, DesiredPower.RUNNING)
            _try_again(course, row, child)
    elif is_done:
        course.put(row, "done", target_host_id=_where_now(course, step), message="")
    elif step.kind is StepKind.RESTART and row.attempts + 1 < TRIES_MAX:
        if _start_again(course, row, step):
            plans.set_step(course.session, row, attempts=row.attempts + 1)
    else:
        _try_again(course, row, child)


def _where_now(course: Course, step: Step) -> str:
    return vms.get(course.session, step.vm_id).host_id if step.moves_vm else step.target_host_id


def _start_again(course: Course, row: PlanStepRow, step: Step) -> bool:
    """Start what was stopped; the scheduler finds the host. False where something else goes first: the next look finds its end."""
    vm = vms.get(course.session, step.vm_id)
    if operations.live_exclusive(course.session, vm.id) is not None:
        return False
    child = _child(course, row, vm, "vm.start", {"to_host_id": step.target_host_id if step.is_target_fixed else ""})
    if child is not None:
        vms.set_desired(course.session, vm.id, DesiredPower.RUNNING)
        course.put(row, "running", operation_id=child.id, message="")
    return child is not None


def _try_again(course: Course, row: PlanStepRow, child: Operation) -> None:
    attempts = row.attempts + 1
    # Cancelled by a person: that vm is meant to stay.
    if child.state is OperationState.CANCELLED or attempts >= TRIES_MAX:
        course.put(row, "failed", attempts=attempts, message=f"{child.kind} {child.id} {child.state.value}: {_why(child)}")
    else:
        course.put(row, "pending", attempts=attempts, operation_id="", message=_why(child))


def _call_off_one(course: Course, row: PlanStepRow) -> bool:
    step = course.plan.steps[row.position]
    if step.kind is StepKind.HOLD and not row.operation_id:
        course.put(row, "cancelled", message="the plan was cancelled")
        return True
    child = operations.get(course.session, row.operation_id)
    if child.state is OperationState.NEEDS_ATTENTION:
        course.put(row, "failed", message=f"{child.kind} {child.id} needs attention: {_why(child)}")
        return True
    if child.state in ENDED_STATES:
        if row.state == "stopping" and child.state is OperationState.DONE:
            _start_again(course, row, step)  # it was stopped for the plan's sake: it runs again before the plan ends
            return False
        if row.state == "stopping":
            vms.set_desired(course.session, step.vm_id, DesiredPower.RUNNING)
        is_done = child.state is OperationState.DONE and step.kind is not StepKind.HOLD
        course.put(row, "done" if is_done else "cancelled", target_host_id=_where_now(course, step))
        return True
    # A start is let through: cancelled, it would leave the vm stopped.
    if child.kind != "vm.start" and not child.is_cancel_requested:
        operations.request_cancel(course.session, child.id, actor=course.actor.name, now=course.now)
    return False


def _why(child: Operation) -> str:
    return child.error.message if child.error is not None else "without a reason"
