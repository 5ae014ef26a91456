"""host.reboot: a host is emptied, restarts, is seen again under another boot id, and takes vms again.

| step   | do                                                                                | undo                              |
|--------|-----------------------------------------------------------------------------------|-----------------------------------|
| hold   | note its boot and who runs there; it was cordoned and held when this was accepted   | end the hold that came with it    |
| empty  | wait for its drain; with `force` have what is left stopped, guest by guest          | start again what was stopped      |
| reboot | the agent lets the operating system restart (pivot)                                 | - a restart cannot be taken back  |
| return | wait until it is up under another boot id                                           | - past the pivot                  |
| finish | start what was stopped; end the hold that came with it                              | - past the pivot                  |

The boot id goes along with the order: an order that comes twice, or after the restart, does nothing. A host that does not come back
keeps its hold, and the operation needs attention; its kept vms were moved or stopped before, so failover has nothing to do.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from trimtab_controller.core.lifecycle import ENDED_STATES, DesiredPower, HostConnectivity
from trimtab_controller.core.model import Actor
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import events, host_reboots, hosts, operations, plans, reach, vms
from trimtab_controller.store.host_reboots import Guest
from trimtab_protos.errors import Conflict, DeadlineExceeded, Unavailable

POLL_S, RETURN_POLL_S = 2.0, 5.0
GUEST_STOP_S = 60
EMPTY_WITHIN = timedelta(minutes=30)
RETURN_WITHIN = timedelta(minutes=15)
"""Servers take minutes to count their memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    host_id: str
    # Stop what does not leave, cleanly first; it starts again afterwards.
    force: bool = False
    # The hold began with this operation, and ends with it.
    ends_hold: bool = False
    # The drain that empties it; '' : none was begun.
    drain_operation_id: str = ""


def _hold(context: Transaction[Params]) -> Json:
    host = hosts.get(context.session, context.params.host_id)
    if host.connectivity is not HostConnectivity.UP:
        raise Conflict("host-not-up", f"host {host.name} is {host.connectivity.value}: it cannot be told to restart")
    return {"boot_id": host.boot_id, "at": context.now.isoformat()}


def _end_hold(context: Transaction[Params]) -> None:
    """Open the host again where it was held for this alone."""
    session, params = context.session, context.params
    held = plans.maintenance_of(session, [params.host_id]).get(params.host_id)
    if not params.ends_hold or held is None:
        return
    plans.end_hold(session, params.host_id)
    if not held.was_cordoned:
        reach.set_cordon(session, params.host_id, is_cordoned=False)


def _empty(context: Transaction[Params]) -> Json | Wait:
    session, params = context.session, context.params
    if params.drain_operation_id and operations.get(session, params.drain_operation_id).state not in ENDED_STATES:
        return Wait(POLL_S, "its drain")
    left = host_reboots.guests_of(session, params.host_id)
    if not left:
        return {"at": context.now.isoformat(), "stopped_vm_ids": _stopped_here(context)}
    names = ", ".join(one.name for one in left[:8])
    if not params.force:
        raise Conflict("host-not-empty", f"{len(left)} vms stay on the host: {names}; `--force` stops them and starts them again")
    if context.now - datetime.fromisoformat(context.results["hold"]["at"]) > EMPTY_WITHIN:
        raise Conflict("host-not-emptied", f"{len(left)} vms did not stop: {names}")
    for one in left:
        if operations.live_exclusive(session, one.id) is None:
            _stop(context, one)
    return Wait(POLL_S, f"{names} to stop")


def _stop(context: Transaction[Params], guest: Guest) -> None:
    """Ask the guest to go; one that did not is switched off."""
    has_been_asked = guest.id in _stopped_here(context)
    vms.set_desired(context.session, guest.id, DesiredPower.STOPPED)
    _accept(context, guest, "vm.stop", {"force": has_been_asked, "timeout_s": GUEST_STOP_S})


def _stopped_here(context: Transaction[Params]) -> list[str]:
    return list(host_reboots.stopped_for(context.session, context.operation.id, since=context.operation.created_at))


def _accept(context: Transaction[Params], guest: Guest, kind: str, params: Json) -> None:
    accept(
        context.session,
        kind,
        subject_id=guest.id,
        subject_name=guest.name,
        project_id=guest.project_id,
        params={"vm_id": guest.id, **params},
        actor=Actor(name=context.operation.actor, request_id=context.operation.id),
        now=context.now,
    )


def _start_again(context: Transaction[Params]) -> None:
    """Start what was stopped for the restart, unless its owner has had other wishes since."""
    session = context.session
    for vm_id in _stopped_here(context):
        vm = vms.get(session, vm_id)
        if vm.deleted_at is not None or vm.desired_power is not DesiredPower.STOPPED or operations.live_exclusive(session, vm_id):
            continue
        vms.set_desired(session, vm_id, DesiredPower.RUNNING)
        guest = Guest(id=vm.id, name=vm.name, project_id=vm.project_id)
        _accept(context, guest, "vm.start", {"to_host_id": ""})


def _reboot(context: Effect[Params]) -> Json:
    host_id, boot_id = context.params.host_id, context.results["hold"]["boot_id"]
    try:
        context.agents.reboot_host(host_id, context.key(subject_id=host_id), boot_id, ends_guests=context.params.force)
    except (Unavailable, DeadlineExceeded):
        # It may have gone down with the answer; a boot id that stays tells.
        if context.read(lambda session: hosts.get(session, host_id)).connectivity is HostConnectivity.UP:
            raise
    return {"boot_id": boot_id}


def _return(context: Transaction[Params]) -> Json | Wait:
    host = hosts.get(context.session, context.params.host_id)
    if host.connectivity is HostConnectivity.UP and host.boot_id != context.results["reboot"]["boot_id"]:
        return {"boot_id": host.boot_id}
    if context.now - datetime.fromisoformat(context.results["empty"]["at"]) > RETURN_WITHIN:
        raise Conflict("host-did-not-return", f"host {host.name} was told to restart and is {host.connectivity.value}")
    return Wait(RETURN_POLL_S, f"host {host.name} to come back")


def _finish(context: Transaction[Params]) -> Json:
    _end_hold(context)
    _start_again(context)
    name = hosts.get(context.session, context.params.host_id).name
    events.append(
        context.session,
        kind="host.rebooted",
        subject_id=context.params.host_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"host {name} was restarted",
        now=context.now,
    )
    return {"stopped_vm_ids": context.results["empty"]["stopped_vm_ids"]}


def _undo_empty(context: Transaction[Params]) -> None:
    _start_again(context)


SAGA = Saga(
    name="host.reboot",
    version=1,
    params=Params,
    steps=(
        transaction("hold", _hold, _end_hold),
        transaction("empty", _empty, _undo_empty),
        effect("reboot", _reboot, None, because="a restart cannot be taken back", pivot=True),
        transaction("return", _return, None, because="past the pivot"),
        transaction("finish", _finish, None, because="past the pivot"),
    ),
)
