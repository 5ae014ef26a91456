"""Plans: made, shown, applied, called off, taken back. What a plan says is `core.planning`'s; how it is carried out, `plan.apply`'s."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Host, Operation, PlanRow, PlanStepRow
from trimtab_controller.core.planning import (
    ConsolidatePolicy,
    Estate,
    History,
    Plan,
    PlanKind,
    RebalancePolicy,
    Slots,
    Step,
    Terms,
    plan_consolidate,
    plan_drain,
    plan_evacuate,
    plan_rebalance,
    plan_upgrade,
    undo_steps,
)
from trimtab_controller.core.planning.peaks import peaks_of
from trimtab_controller.core.planning.pool_drain import PoolContents, plan_pool_drain
from trimtab_controller.core.planning.staleness import pins_of
from trimtab_controller.core.planning.timeline import timed
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.estates import read_estate, read_networks, read_rates
from trimtab_controller.operations.plan_steps import WAS_CORDONED
from trimtab_controller.operations.pool_estates import read_contents
from trimtab_controller.operations.sagas.apply_plan import check_fresh
from trimtab_controller.services import hosts_admin, pools
from trimtab_controller.store import events, hosts, keyset, lookup, operations, plans, reach, schema
from trimtab_protos.errors import Conflict, InvalidRequest

KEPT = timedelta(days=90)
_MOVED_LOOKED_BACK = timedelta(hours=24)
_OF_HOSTS = frozenset({PlanKind.DRAIN, PlanKind.EVACUATE, PlanKind.UPGRADE})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWish:
    kind: PlanKind
    hosts: tuple[str, ...] = ()
    """Names or ids."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Hosts by label, beside those that are named."""
    deadline_s: float | None = None
    max_moves: int | None = None
    plan_id: str = ""
    """For `undo`: the plan to take back."""
    pool: str = ""
    """For `drain-pool`: the name or id of the pool to empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    row: PlanRow
    plan: Plan
    steps: tuple[PlanStepRow, ...]
    """Empty until the plan is applied, and in lists."""
    host_names: Mapping[str, str]
    is_full: bool
    """False in lists: without the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """Everything that a plan is made from, read in one snapshot."""

    wish: PlanWish
    estate: Estate
    scope: tuple[str, ...]
    terms: Terms
    history: History
    contents: PoolContents | None = None
    """For `drain-pool`."""
    done: tuple[Step, ...] = ()
    """For `undo`: the steps that were done, with the targets that they got."""


def gather(session: Session, wish: PlanWish, *, now: datetime) -> PlanInputs:
    """Read what the plan is made from. NotFound for a host that there is not, InvalidRequest where the kind needs hosts."""
    return PlanInputs(
        wish=wish,
        estate=read_estate(session, now=now),
        scope=_scope(session, wish),
        terms=Terms(slots=Slots(network_of=read_networks(session)), rates=read_rates(session), deadline_s=wish.deadline_s),
        history=_history(session, now) if wish.kind is PlanKind.REBALANCE else History(),
        contents=read_contents(session, pools.find(session, wish.pool).id) if wish.kind is PlanKind.DRAIN_POOL else None,
        done=_done_steps(session, wish.plan_id) if wish.kind is PlanKind.UNDO else (),
    )


def decide(inputs: PlanInputs) -> Plan:
    """Return the plan. Takes seconds for a large fleet: call it where nothing waits, and in no transaction."""
    wish, estate, terms = inputs.wish, inputs.estate, inputs.terms
    match wish.kind:
        case PlanKind.DRAIN:
            return plan_drain(estate, inputs.scope, terms)
        case PlanKind.UPGRADE:
            return plan_upgrade(estate, inputs.scope, terms)
        case PlanKind.EVACUATE:
            return plan_evacuate(estate, inputs.scope, terms)
        case PlanKind.REBALANCE:
            policy = RebalancePolicy()
            policy = replace(policy, moves_per_hour=wish.max_moves or policy.moves_per_hour)
            return plan_rebalance(estate, policy, terms, history=inputs.history)
        case PlanKind.CONSOLIDATE:
            limit = ConsolidatePolicy()
            limit = replace(limit, moves_max=wish.max_moves or limit.moves_max)
            return plan_consolidate(estate, limit, terms)
        case PlanKind.DRAIN_POOL:
            assert inputs.contents is not None, "a pool that is drained was read"
            return plan_pool_drain(inputs.contents, terms.slots, terms.rates)
        case PlanKind.UNDO:
            return _undo(inputs)


def create(session: Session, wish: PlanWish, *, actor: Actor, now: datetime) -> PlanView:
    """Make a plan and store it, open for review."""
    return keep(session, decide(gather(session, wish, now=now)), actor=actor, now=now)


def keep(session: Session, plan: Plan, *, actor: Actor, now: datetime) -> PlanView:
    """Store a plan, open for review."""
    row = plans.insert(session, plan, plan_id=mint("plan"), created_by=actor.name, now=now)
    events.append(
        session, kind="plan.created", subject_id=row.id, actor=actor.name, message=f"plan: {row.summary}"[:500], now=now
    )
    return _view(session, row, with_steps=True)


def get(session: Session, plan_id: str) -> PlanView:
    return _view(session, plans.get(session, plan_id), with_steps=True)


def page(session: Session, page: keyset.Page) -> tuple[tuple[PlanView, ...], tuple[str, str] | None]:
    found, after = plans.page(session, page)
    return tuple(_view(session, row, with_steps=False) for row in found), after


def apply(session: Session, plan_id: str, *, actor: Actor, now: datetime, slots: Slots | None = None) -> Operation:
    """Accept the carrying out. Conflict `plan-state`, or `plan-stale` where the fleet changed in a way that matters."""
    row = plans.get(session, plan_id)
    plan = Plan.from_json(row.changes)
    if row.state != "open":
        raise Conflict("plan-state", f"plan {plan_id} is {row.state}; only an open one is applied", state=row.state)
    if plan.kind is PlanKind.EVACUATE:
        message = "evacuation is the failover's work: it restarts the vms of a host as soon as the host is fenced"
        raise Conflict("plan-not-applied", f"{message}; this plan shows where they would start")
    check_fresh(session, plan, now=now)
    chosen = slots or Slots()
    params = {"plan_id": plan_id, "per_host": chosen.per_host, "per_network": chosen.per_network}
    return accept(
        session,
        "plan.apply",
        subject_id=plan_id,
        subject_name=plan_id,
        project_id="",
        params=params,
        actor=actor,
        now=now,
    )


def cancel(session: Session, plan_id: str, *, actor: Actor, now: datetime) -> Operation:
    """Ask the carrying out to stop. Conflict where it is not under way."""
    row = plans.get(session, plan_id)
    live = operations.live_exclusive(session, row.id)
    if live is None:
        raise Conflict("plan-state", f"plan {plan_id} is {row.state}, not under way", state=row.state)
    return operations.request_cancel(session, live.id, actor=actor.name, now=now)


def delete(session: Session, plan_id: str) -> None:
    """Forget a plan that is not under way."""
    row = plans.get(session, plan_id)
    if row.state == "applying" or operations.live_exclusive(session, row.id) is not None:
        raise Conflict("plan-state", f"plan {plan_id} is under way; cancel it first with `trimtab plan cancel {plan_id}`")
    plans.delete(session, plan_id)


def begin_maintenance(session: Session, host: Host, *, actor: Actor, now: datetime) -> tuple[PlanView, Operation]:
    """Hold the host, and drain it. Conflict (`host-in-maintenance`) where it is held already."""
    if plans.maintenance_of(session, [host.id]):
        raise Conflict("host-in-maintenance", f"host {host.name} is in maintenance already")
    was_cordoned = reach.set_cordon(session, host.id, is_cordoned=True)
    view = create(session, PlanWish(kind=PlanKind.DRAIN, hosts=(host.id,)), actor=actor, now=now)
    plans.hold_host(session, host.id, plan_id="", was_cordoned=was_cordoned, created_by=actor.name, now=now)
    events.append(
        session,
        kind="host.maintenance_started",
        subject_id=host.id,
        actor=actor.name,
        message=f"host {host.name} is in maintenance",
        now=now,
    )
    return view, apply(session, view.row.id, actor=actor, now=now)


def end_maintenance(session: Session, host: Host, *, actor: Actor, now: datetime) -> None:
    """End the hold; the host takes vms again unless it was cordoned before. Conflict where it is not held."""
    held = plans.maintenance_of(session, [host.id]).get(host.id)
    if held is None:
        raise Conflict("host-not-in-maintenance", f"host {host.name} is not in maintenance")
    plans.end_hold(session, host.id)
    if not held.was_cordoned:
        reach.set_cordon(session, host.id, is_cordoned=False)
    events.append(
        session,
        kind="host.maintenance_ended",
        subject_id=host.id,
        actor=actor.name,
        message=f"host {host.name} is out of maintenance",
        now=now,
    )


def _scope(session: Session, wish: PlanWish) -> tuple[str, ...]:
    named = [hosts_admin.find(session, name).id for name in wish.hosts]
    if wish.kind not in _OF_HOSTS:
        if named or wish.labels:
            raise InvalidRequest("hosts-not-taken", f"a plan of kind {wish.kind.value} is about the whole fleet; name no hosts")
        return ()
    is_whole_fleet = wish.kind is PlanKind.UPGRADE and not named and not wish.labels
    live = hosts.live(session) if wish.labels or is_whole_fleet else ()
    chosen = [host.id for host in live if wish.labels.items() <= host.labels.items()]
    found = tuple(dict.fromkeys([*named, *chosen]))
    if not found:
        raise InvalidRequest(
            "hosts-missing", f"a plan of kind {wish.kind.value} needs hosts: name them, or a label that some have"
        )
    return found


def _history(session: Session, now: datetime) -> History:
    moved = plans.moved_since(session, now - _MOVED_LOOKED_BACK, [PlanKind.REBALANCE.value])
    return History(moved_ago_s={vm_id: (now - at).total_seconds() for vm_id, at in moved.items()})


def _done_steps(session: Session, plan_id: str) -> tuple[Step, ...]:
    row = plans.get(session, plan_id)
    if row.state not in {"applied", "incomplete", "cancelled"}:
        raise Conflict(
            "plan-state", f"plan {plan_id} is {row.state}; only one that was applied can be taken back", state=row.state
        )
    applied = Plan.from_json(row.changes)
    return tuple(
        replace(applied.steps[one.position], target_host_id=one.target_host_id)
        for one in plans.steps_of(session, plan_id)
        if one.state == "done" and one.message != WAS_CORDONED
    )


def _undo(inputs: PlanInputs) -> Plan:
    estate, terms = inputs.estate, inputs.terms
    steps, duration_s = timed(undo_steps(_still_there(inputs.done, estate)), terms.slots, terms.rates)
    scope = tuple(dict.fromkeys(step.host_id for step in steps))
    return Plan(
        kind=PlanKind.UNDO,
        scope=scope,
        steps=steps,
        pins=pins_of(estate, steps, scope),
        peaks=peaks_of(estate, steps),
        duration_s=duration_s,
        summary=f"undo of {inputs.wish.plan_id}: {len(steps)} steps, about {duration_s:.0f} s",
    )


def _still_there(done: Sequence[Step], estate: Estate) -> list[Step]:
    """Leave out vms that moved on or went away since."""
    last = {step.vm_id: step.target_host_id for step in done if step.moves_vm}
    return [
        step
        for step in done
        if not step.moves_vm or (step.vm_id in estate.vms and estate.vms[step.vm_id].host_id == last[step.vm_id])
    ]


def _view(session: Session, row: PlanRow, *, with_steps: bool) -> PlanView:
    plan = Plan.from_json(row.changes)
    ids = {*plan.scope, *(step.host_id for step in plan.steps), *(step.target_host_id for step in plan.steps)} - {""}
    names = lookup.names(session, schema.host, ids if with_steps else plan.scope)
    if plan.kind in {PlanKind.DRAIN_POOL, PlanKind.UNDO}:
        named = {*plan.scope, *(step.pool_id for step in plan.steps), *(step.target_pool_id for step in plan.steps)} - {""}
        names = {**names, **lookup.names(session, schema.pool, named)}
    steps = plans.steps_of(session, row.id) if with_steps else ()
    return PlanView(row=row, plan=plan, steps=steps, host_names=names, is_full=with_steps)
