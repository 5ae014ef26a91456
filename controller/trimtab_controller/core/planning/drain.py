"""Plans that empty hosts: drain, evacuate, upgrade. Every target is the scheduler's choice on the books of the plan so far.

At apply the scheduler picks again when a step's turn comes; the plan shows what it would pick now, and who cannot go at all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from trimtab_controller.core.placement import BEST_FIT, Decision, Policy
from trimtab_controller.core.planning.estate import DrainPolicy, Estate, VmSnapshot, has_local_disk
from trimtab_controller.core.planning.obstacles import no_target, recovery_blocker, way_out
from trimtab_controller.core.planning.peaks import peaks_of
from trimtab_controller.core.planning.plan import Blocker, Cause, Plan, PlanKind, Step, StepKind
from trimtab_controller.core.planning.staleness import pins_of
from trimtab_controller.core.planning.timeline import Rates, Slots, timed
from trimtab_controller.core.planning.what_if import WhatIf


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What every plan is made under."""

    slots: Slots = field(default_factory=Slots)
    rates: Rates = field(default_factory=Rates)
    policy: Policy = BEST_FIT
    deadline_s: float | None = None
    """From the start of the plan; None: it takes as long as it takes."""


def plan_drain(estate: Estate, host_ids: Sequence[str], terms: Terms) -> Plan:
    """Return how these hosts are emptied: cordons first, then the vms, large ones first within a priority.

    KeyError where a host is not in the fleet.
    """
    what_if, blockers = WhatIf(estate), []
    for host_id in host_ids:
        if not estate.fleet.hosts[estate.fleet.row_of[host_id]].is_cordoned:
            what_if.mark(StepKind.CORDON, host_id, why="no new vms come while the present ones leave")
    for host_id in host_ids:
        blockers += _leave(what_if, host_id, terms.policy, shut=host_ids)
    return finished(PlanKind.DRAIN, what_if, host_ids, blockers, terms)


def plan_evacuate(estate: Estate, host_ids: Sequence[str], terms: Terms) -> Plan:
    """Return where the protected vms of lost hosts would start again, the most important first."""
    what_if, blockers = WhatIf(estate), []
    for vm in in_order(vm for host_id in host_ids for vm in estate.on(host_id)):
        blocker = recovery_blocker(vm, estate)
        if blocker is None:
            decision = what_if.decide(vm, StepKind.RECOVER, excluded=host_ids, policy=terms.policy)
            blocker = _go(what_if, vm, StepKind.RECOVER, decision)
        if blocker is not None:
            blockers.append(blocker)
    return finished(PlanKind.EVACUATE, what_if, host_ids, blockers, terms)


def plan_upgrade(estate: Estate, host_ids: Sequence[str], terms: Terms) -> Plan:
    """Return a tour over these hosts: cordon, drain, hold until the operator ends the maintenance, open; then the next.

    The emptiest host goes first, and vms go to hosts that are done already where these have room, so that few move twice.
    """
    what_if, blockers = WhatIf(estate), []
    tour = sorted(host_ids, key=lambda host_id: (len(estate.by_host[host_id]), estate.host_name(host_id)))
    last: tuple[int, ...] = ()
    for position, host_id in enumerate(tour):
        waiting = tour[position + 1 :]
        first = len(what_if.steps)
        what_if.mark(StepKind.CORDON, host_id, after=last, why="its turn")
        blockers += _leave(what_if, host_id, terms.policy, shut=(), later=waiting, after=(first,))
        own = tuple(range(first, len(what_if.steps)))
        hold = what_if.mark(StepKind.HOLD, host_id, after=own, why="until `trimtab host maintenance end`")
        opened = what_if.mark(StepKind.UNCORDON, host_id, after=(hold.position,), why="it takes vms again")
        last = (opened.position,)
    return finished(PlanKind.UPGRADE, what_if, tour, blockers, terms)


def in_order(vms: Iterable[VmSnapshot]) -> list[VmSnapshot]:
    """Return the vms by priority, then size: a large one finds its place only while there is room for it."""
    return sorted(vms, key=lambda vm: (-vm.priority, -vm.request.memory_mib, -vm.request.vcpus, vm.name, vm.vm_id))


def finished(kind: PlanKind, what_if: WhatIf, scope: Sequence[str], blockers: list[Blocker], terms: Terms) -> Plan:
    """Return the plan of the steps gathered so far: timed, pinned, with peaks and what is late."""
    estate = what_if.estate
    steps, duration_s = timed(what_if.steps, terms.slots, terms.rates)
    late, late_blockers = _late(steps, blockers, terms.deadline_s)
    plan = Plan(
        kind=kind,
        scope=tuple(scope),
        steps=steps,
        blockers=(*blockers, *late_blockers),
        pins=pins_of(estate, steps, scope),
        peaks=peaks_of(estate, steps),
        duration_s=duration_s,
        deadline_s=terms.deadline_s,
        late=late,
    )
    return replace(plan, summary=_summary(plan, estate))


def _leave(
    what_if: WhatIf,
    host_id: str,
    policy: Policy,
    *,
    shut: Sequence[str],
    later: Sequence[str] = (),
    after: tuple[int, ...] = (),
) -> list[Blocker]:
    """Book the way out of every vm that is on this host now; `later` hosts are entered only where no other has room."""
    here = (vm for vm in what_if.estate.vms.values() if what_if.host_of[vm.vm_id] == host_id)
    found = []
    for own in in_order(here):
        vm = replace(own, host_id=host_id)
        way = way_out(vm, what_if.estate)
        if isinstance(way, Blocker):
            found.append(way)
        elif way is not None:
            kind, decision = _choose(what_if, vm, way, policy, shut=shut, later=later)
            blocker = _go(what_if, vm, kind, decision, after=after)
            if blocker is not None:
                found.append(blocker)
    return found


def _choose(
    what_if: WhatIf, vm: VmSnapshot, kind: StepKind, policy: Policy, *, shut: Sequence[str], later: Sequence[str]
) -> tuple[StepKind, Decision]:
    if later:
        decision = what_if.decide(vm, kind, excluded=[*shut, *later], policy=policy)
        if decision.chosen_host_id is not None:
            return kind, decision
    decision = what_if.decide(vm, kind, excluded=shut, policy=policy)
    may_restart = vm.drain_policy is DrainPolicy.RESTART and not has_local_disk(vm, what_if.estate.fleet)
    if decision.chosen_host_id is None and kind is StepKind.MIGRATE and may_restart:
        return StepKind.RESTART, what_if.decide(vm, StepKind.RESTART, excluded=shut, policy=policy)
    return kind, decision


def _go(what_if: WhatIf, vm: VmSnapshot, kind: StepKind, decision: Decision, *, after: tuple[int, ...] = ()) -> Blocker | None:
    if decision.chosen_host_id is None:
        return no_target(vm, kind, decision)
    what_if.move(vm, kind, decision.chosen_host_id, after=after, why=decision.summary())
    return None


def _late(steps: Sequence[Step], blockers: Sequence[Blocker], deadline_s: float | None) -> tuple[str, list[Blocker]]:
    """Return which vm is in the way when the deadline passes, and a blocker for each vm that a plan in time leaves behind."""
    if deadline_s is None:
        return "", []
    overdue = sorted((step for step in steps if step.moves_vm and step.ends_s > deadline_s), key=lambda step: step.ends_s)
    if not overdue:
        waiting = blockers[0] if blockers else None
        return (f"{waiting.vm_name} stays: {waiting.message}" if waiting else ""), []
    found = [
        Blocker(
            cause=Cause.DEADLINE,
            vm_id=step.vm_id,
            vm_name=step.vm_name,
            host_id=step.host_id,
            message=f"it arrives {step.ends_s:.0f} s after the start, the deadline is {deadline_s:.0f} s",
            cure="allow more time with --deadline, or more migration slots",
        )
        for step in overdue
    ]
    first = overdue[0]
    return f"{first.vm_name} is still moving when {deadline_s:.0f} s have passed: it needs until {first.ends_s:.0f} s", found


def _summary(plan: Plan, estate: Estate) -> str:
    names = ", ".join(estate.host_name(host_id) for host_id in plan.scope[:4]) + (", …" if len(plan.scope) > 4 else "")
    about = f"{plan.kind.value} {names}".strip()
    moves, blocked = len(plan.moves), len(plan.blockers)
    if not moves and not blocked:
        return f"{about}: nothing to move"
    told = f"{about}: {_counted(moves, 'move')}, about {plan.duration_s:.0f} s"
    return f"{told}, {_counted(blocked, 'blocker')}" if blocked else told


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
