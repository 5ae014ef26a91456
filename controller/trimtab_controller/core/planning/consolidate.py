"""Empties as many hosts as the rest can take, so that they can be switched off, repaired or given away.

A host is emptied wholly or not at all, the emptiest first, and nothing goes to a host that is empty. The plan ends where no single
host can be emptied any more, so that the state it leaves gives no second plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.planning.drain import Terms, finished, in_order
from trimtab_controller.core.planning.estate import Estate, Power, VmSnapshot
from trimtab_controller.core.planning.obstacles import way_out
from trimtab_controller.core.planning.plan import Plan, PlanKind, StepKind
from trimtab_controller.core.planning.what_if import WhatIf, request_for, shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidatePolicy:
    load_ceiling: float = 0.7
    """The predicted CPU share that no host exceeds by taking vms in."""
    moves_max: int = 500
    """Hosts that would need more are left as they are."""


def plan_consolidate(estate: Estate, policy: ConsolidatePolicy, terms: Terms) -> Plan:
    """Return the moves that empty hosts; a plan without steps says that none can be emptied."""
    state = _State(estate, policy)
    before = state.occupied_count()
    while _pass(state, terms):
        pass
    what_if = shortened(state.what_if)
    emptied = [host_id for host_id in state.hosts if estate.by_host[host_id] and not state.guests[host_id]]
    plan = finished(PlanKind.CONSOLIDATE, what_if, emptied, [], terms)
    if not emptied:
        return replace(plan, summary="consolidate: no host can be emptied onto the others")
    names = ", ".join(estate.host_name(host_id) for host_id in emptied[:4]) + (", …" if len(emptied) > 4 else "")
    summary = f"consolidate: {len(plan.moves)} moves empty {len(emptied)} of {before} hosts in use: {names}"
    figures = {"hosts_in_use": float(before)}
    return replace(plan, summary=summary, before=figures, expected={"hosts_in_use": float(state.occupied_count())})


class _State:
    __slots__ = ("estate", "guests", "hosts", "loads", "moved", "policy", "what_if")

    def __init__(self, estate: Estate, policy: ConsolidatePolicy) -> None:
        self.estate = estate
        self.policy = policy
        self.what_if = WhatIf(estate)
        self.hosts = [
            host.host_id for host in estate.fleet.hosts if host.connectivity is HostConnectivity.UP and not host.is_cordoned
        ]
        self.guests: dict[str, set[str]] = {host.host_id: set(estate.by_host[host.host_id]) for host in estate.fleet.hosts}
        self.loads = {host_id: sum(vm.load_millis for vm in estate.on(host_id)) for host_id in self.guests}
        self.moved: set[str] = set()

    def occupied_count(self) -> int:
        return sum(1 for host_id in self.hosts if self.guests[host_id])

    def is_emptiable(self, host_id: str) -> bool:
        """Tell whether all that is here can move live; a stopped vm with a disk here keeps the host in use."""
        vms = [self.estate.vms[vm_id] for vm_id in self.guests[host_id]]
        return bool(vms) and all(vm.power is Power.RUNNING and way_out(vm, self.estate) is StepKind.MIGRATE for vm in vms)

    def closed_to(self, vm: VmSnapshot, source: str) -> list[str]:
        """Return hosts that must not take it: the one it leaves, empty ones, and those that would run hot."""
        ceiling = self.policy.load_ceiling
        return [
            host_id
            for host_id, load in self.loads.items()
            if host_id == source
            or not self.guests[host_id]
            or (vm.load_millis and load + vm.load_millis > ceiling * self.estate.capacity_millis(host_id))
        ]

    def book(self, vm: VmSnapshot, source: str, target: str) -> None:
        self.guests[source].discard(vm.vm_id)
        self.guests[target].add(vm.vm_id)
        self.loads[source] -= vm.load_millis
        self.loads[target] += vm.load_millis
        self.moved.add(vm.vm_id)


def _pass(state: _State, terms: Terms) -> bool:
    """Try every host once, the emptiest first; tell whether one was emptied."""
    has_emptied = False
    for host_id in sorted(state.hosts, key=lambda host_id: (_held(state, host_id), state.estate.host_name(host_id))):
        if state.is_emptiable(host_id):
            has_emptied |= _empty(state, host_id, terms)
    return has_emptied


def _held(state: _State, host_id: str) -> int:
    return sum(state.estate.vms[vm_id].request.memory_mib for vm_id in state.guests[host_id])


def _empty(state: _State, host_id: str, terms: Terms) -> bool:
    """Find a place for every vm of the host on books that are put back; book the moves where all found one."""
    vms = in_order(state.estate.vms[vm_id] for vm_id in state.guests[host_id])
    if len(state.moved | {vm.vm_id for vm in vms}) > state.policy.moves_max:
        return False
    found = _places(state, vms, host_id, terms)
    if found is None:
        return False
    for vm, target in found:
        why = f"empties {state.estate.host_name(host_id)}"
        state.what_if.move(vm, StepKind.MIGRATE, target, is_fixed=True, why=why)
        state.book(vm, host_id, target)
    return True


def _places(state: _State, vms: Sequence[VmSnapshot], source: str, terms: Terms) -> list[tuple[VmSnapshot, str]] | None:
    books, found = state.what_if.books, []
    loads = dict(state.loads)
    for vm in vms:
        decision = state.what_if.decide(vm, StepKind.MIGRATE, excluded=state.closed_to(vm, source), policy=terms.policy)
        if decision.chosen_host_id is None:
            break
        books.claim(decision.request, decision.chosen_host_id)
        state.loads[decision.chosen_host_id] += vm.load_millis
        found.append((vm, decision.chosen_host_id))
    for vm, target in found:
        books.release(request_for(vm, StepKind.MIGRATE), target)
    state.loads = loads
    return found if len(found) == len(vms) else None
