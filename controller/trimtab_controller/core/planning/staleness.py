"""Is a plan still about the fleet as it is? Pins what a plan read, and says at apply what changed in a way that matters.

A version that moved is only a hint: an address or an observation may have changed. What matters is in the fingerprint, and whether
the steps still fit, which is tried on the books of now.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from trimtab_controller.core.placement import FleetSnapshot, HostSnapshot, Stock
from trimtab_controller.core.planning.estate import Estate, Power, VmSnapshot
from trimtab_controller.core.planning.plan import Pin, Plan, PlanKind, Step, StepKind
from trimtab_controller.core.planning.what_if import WhatIf

# What moves with every placement or report and is tried on the books instead, or says nothing about where a vm may go.
_HOST_IGNORED = frozenset(
    {
        "vcpus_claimed",
        "memory_claimed_mib",
        "unmanaged_vcpus",
        "unmanaged_memory_mib",
        "labels",
        "generation",
        "image_ids",
        "is_cordoned",
        "name",
    }
)
_REQUEST_IGNORED = frozenset({"request_id", "order", "excluded_host_ids", "required_host_id", "preferred_host_id"})


@dataclass(frozen=True, slots=True)
class Change:
    """One reason why a plan is refused."""

    object_id: str
    message: str


def pins_of(estate: Estate, steps: Sequence[Step], scope: Iterable[str]) -> tuple[Pin, ...]:
    """Return a pin for every vm that moves and every host that is left, entered or named, in order of id."""
    vm_ids = {step.vm_id for step in steps if step.moves_vm}
    host_ids = {*scope, *(step.host_id for step in steps), *(step.target_host_id for step in steps)} & estate.fleet.row_of.keys()
    known = [estate.vms[vm_id] for vm_id in vm_ids if vm_id in estate.vms]
    found = [Pin(object_id=vm.vm_id, name=vm.name, version=vm.version, fingerprint=_vm_print(vm)) for vm in known]
    for host_id in host_ids:
        host = estate.fleet.hosts[estate.fleet.row_of[host_id]]
        version = estate.host_versions.get(host_id, 0)
        found.append(Pin(object_id=host_id, name=host.name, version=version, fingerprint=_host_print(host)))
    return tuple(sorted(found, key=lambda pin: pin.object_id))


def changes(plan: Plan, estate: Estate) -> tuple[Change, ...]:
    """Return every change since the plan was made that matters to it; empty: it may be applied.

    Does not matter: observations, names, claims that leave room for the plan, a vm of a drained host that went away by itself.
    """
    told = {pin.object_id for pin in plan.pins} | {blocker.vm_id for blocker in plan.blockers}
    found = [
        change
        for pin in plan.pins
        if (change := _host_change(pin, estate) if pin.object_id in estate.fleet.row_of else _vm_change(pin, plan, estate))
    ]
    if plan.kind in {PlanKind.DRAIN, PlanKind.UPGRADE}:
        found += [
            Change(vm.vm_id, f"vm {vm.name} came to host {estate.host_name(host_id)} after the plan was made")
            for host_id in plan.scope
            for vm in estate.on(host_id)
            if vm.power is not Power.STOPPED and vm.vm_id not in told
        ]
    return tuple(found or _no_longer_fits(plan, estate))


def _vm_change(pin: Pin, plan: Plan, estate: Estate) -> Change | None:
    vm = estate.vms.get(pin.object_id)
    step = next((step for step in plan.steps if step.vm_id == pin.object_id), None)
    if step is None:
        return Change(pin.object_id, f"host {pin.name} is not in the fleet any more")
    if vm is None or vm.host_id != step.host_id:
        if not step.is_target_fixed:
            return None  # it has left by itself: the step finds nothing to do
        where = "is gone" if vm is None else f"is on {estate.host_name(vm.host_id)} now"
        return Change(pin.object_id, f"vm {pin.name} {where}; the plan moves it from {estate.host_name(step.host_id)}")
    if vm.version != pin.version and _vm_print(vm) != pin.fingerprint:
        return Change(pin.object_id, f"vm {pin.name} was changed after the plan was made")
    return None


def _host_change(pin: Pin, estate: Estate) -> Change | None:
    host = estate.fleet.hosts[estate.fleet.row_of[pin.object_id]]
    is_same_version = estate.host_versions.get(pin.object_id, 0) == pin.version
    if is_same_version or _host_print(host) == pin.fingerprint:
        return None
    return Change(pin.object_id, f"host {pin.name} was changed after the plan was made")


def _no_longer_fits(plan: Plan, estate: Estate) -> list[Change]:
    """Return the first step that has no room any more, as a change; targets that the scheduler picks again may differ."""
    trial = WhatIf(_with_opened(estate, {step.host_id for step in plan.steps if step.kind is StepKind.UNCORDON}))
    opened = tuple(step.host_id for step in plan.steps if step.kind is StepKind.CORDON)
    for step in (one for one in plan.moves if one.moves_vm):
        vm = estate.vms.get(step.vm_id)
        if vm is None or trial.host_of[step.vm_id] != step.host_id:
            continue
        # The forecast first: another choice for an early step could take the only place of a later one.
        decision = trial.decide(vm, step.kind, target_host_id=step.target_host_id)
        if decision.chosen_host_id is None and not step.is_target_fixed:
            excluded = () if plan.kind is PlanKind.UPGRADE else opened
            decision = trial.decide(vm, step.kind, target_host_id="", excluded=excluded)
        if decision.chosen_host_id is None:
            return [Change(step.vm_id, f"vm {step.vm_name} has no place any more: {decision.summary()}")]
        trial.move(vm, step.kind, decision.chosen_host_id)
    return []


def _with_opened(estate: Estate, host_ids: set[str]) -> Estate:
    """Return the estate with these hosts open: the plan opens them before it needs them."""
    shut = [host for host in estate.fleet.hosts if host.host_id in host_ids and host.is_cordoned]
    if not shut:
        return estate
    hosts = [replace(host, is_cordoned=False) if host in shut else host for host in estate.fleet.hosts]
    fleet = FleetSnapshot.of(hosts, estate.fleet.pools.values(), groups=estate.fleet.groups)
    return replace(estate, fleet=fleet)


def _vm_print(vm: VmSnapshot) -> str:
    request = {name: value for name, value in _items(vm.request) if name not in _REQUEST_IGNORED}
    return _digest([request, vm.power, vm.drain_policy, vm.devices, vm.is_protected])


def _host_print(host: HostSnapshot) -> str:
    known = replace(
        host,
        cells=tuple(cell.emptied() for cell in host.cells),
        devices=_unclaimed(host.devices),
        resources=_unclaimed(host.resources),
    )
    return _digest({name: value for name, value in _items(known) if name not in _HOST_IGNORED})


def _unclaimed(stocks: Mapping[str, Stock]) -> dict[str, Stock]:
    return {name: replace(stock, claimed=0) for name, stock in stocks.items()}


def _items(one: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(one, field.name)) for field in fields(one)]


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]


def _canonical(value: Any) -> str:
    """Return equal text for equal values, whatever the order of mappings and sets."""
    if isinstance(value, Enum):
        return repr(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return _canonical(dict(_items(value)))
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{_canonical(key)}:{_canonical(own)}" for key, own in value.items())) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(_canonical(own) for own in value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_canonical(own) for own in value) + "]"
    return repr(value)
