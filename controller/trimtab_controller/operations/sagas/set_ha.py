"""vm.set_ha: whether a vm goes on elsewhere when its host dies changes, and how early it does so.

| step   | do                                                                  | undo                     |
|--------|---------------------------------------------------------------------|--------------------------|
| own    | (order, delay, group, and that it is *not* kept any more: at acceptance) | what they were before |
| tell   | the host's domain says so, and its warden knows the guest            | as it was before         |
| finish | record that it is kept                                              | - last                   |

The warden of a host that lost its lease ends exactly the guests that may be started elsewhere meanwhile. So it has to know of the guest
before SQL says that it is kept, and may forget it only after SQL says that it is not: in either order's middle a guest is at worst
ended and not started again. A host that is not up is not told that a guest is no longer kept; the next start of the vm tells it.

A recovery or a forced stop may supersede it. What was recorded at acceptance stays, and where that was all (`in_force`) it is done: a vm
that waits to start elsewhere and is taken out of its group starts within the second, which is what its owner wished.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from trimtab_controller.core.lifecycle import DesiredPower, HostConnectivity, ObservedState, OperationState
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.operations import live_changes
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, events, hosts, vms
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict

_CHANGED = ("ha", "priority", "start_delay_s", "start_group", "start_order")


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    ha: str
    before_ha: str
    before_priority: int
    before_start_delay_s: int
    # Operations of an earlier release have neither; its vms were in no group.
    before_start_group: str = ""
    before_start_order: int = 0


def before(vm: Vm) -> dict[str, Any]:
    """Return the params that say what the vm was before the change."""
    return {f"before_{name}": getattr(vm, name) for name in _CHANGED}


def in_force(operation: Operation) -> Json | None:
    """Return the result of one that is superseded and took effect with its acceptance; None where the vm was yet to be kept."""
    params = Params(**operation.params)
    if operation.state is OperationState.COMPENSATING or params.ha not in {params.before_ha, "none"}:
        return None
    return {"is_host_told": params.ha == params.before_ha}


def tell_changed(session: Session, operation: Operation, *, now: datetime) -> None:
    """Tell, as an event, what holds of the vm from now on."""
    vm = vms.get(session, operation.subject_id)
    does = "restarts elsewhere when its host dies" if vm.ha == "restart" else "stays down when its host dies"
    events.append(
        session,
        kind="vm.ha_changed",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=operation.id,
        actor=operation.actor,
        message=f"vm {vm.name} {does}; priority {vm.priority}, start delay {vm.start_delay_s} s{_place(vm)}",
        context={name: getattr(vm, name) for name in _CHANGED},
        now=now,
    )


def _own(_context: Transaction[Params]) -> None:
    """What may be said before the host is told was recorded when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    params = context.params
    vms.update(context.session, params.vm_id, **{name: getattr(params, f"before_{name}") for name in _CHANGED})


def _tell(context: Effect[Params]) -> Json:
    params = context.params
    if params.ha == params.before_ha:
        return {"is_told": True}
    vm = context.read(lambda session: vms.get(session, params.vm_id))
    is_off = vm.observed_state in {ObservedState.STOPPED, ObservedState.ABSENT} and vm.desired_power is not DesiredPower.RUNNING
    if not vm.host_id or is_off:
        return {"is_told": True}  # each start tells
    if (
        params.ha == "none"
        and context.read(lambda session: hosts.get(session, vm.host_id)).connectivity is not HostConnectivity.UP
    ):
        return {"is_told": False}
    _tell_host(context, params.ha)
    return {"is_told": True}


def _untell(context: Effect[Params]) -> None:
    if context.results.get("tell", {}).get("is_told", True) and context.params.ha != context.params.before_ha:
        vm = context.read(lambda session: vms.get(session, context.params.vm_id))
        if vm.host_id:
            _tell_host(context, context.params.before_ha)


def _tell_host(context: Effect[Params], ha: str) -> None:
    parts = context.read(lambda session: describe.read_vm(session, context.params.vm_id))
    seen, _left = live_changes.ask_guest(
        context,
        host_id=parts.vm.host_id,
        epoch=parts.vm.epoch,
        part=ha,
        parts_of=lambda parts: replace(parts, vm=replace(parts.vm, ha=ha)),
    )
    is_movable = all(parts.pools[one.pool_id].is_shared for one in parts.volumes if not one.is_read_only)
    if seen.restarts_elsewhere is not (ha == "restart" and is_movable):
        raise Conflict(
            "ha-not-in-force",
            f"the host's domain of vm {parts.vm.name} does not say what it was told; stop and start the vm, then try again",
            vm=parts.vm.name,
        )


def _finish(context: Transaction[Params]) -> None:
    params = context.params
    vms.update(context.session, params.vm_id, ha=params.ha)
    tell_changed(context.session, context.operation, now=context.now)


def _place(vm: Vm) -> str:
    return f", order {vm.start_order} in start group {vm.start_group}" if vm.start_group else ""


SAGA = Saga(
    name="vm.set_ha",
    version=1,
    params=Params,
    result=lambda results: {"is_host_told": results["tell"]["is_told"]},
    steps=(
        transaction("own", _own, _disown),
        effect("tell", _tell, _untell),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
