"""What attaching and detaching have in common: a device is a volume or a nic, named by the operation's params."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from trimtab_controller.operations.saga import Transaction
from trimtab_controller.store import describe, events, vms, volume_claims
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import ChangeLeft


class DeviceParams(Protocol):
    @property
    def vm_id(self) -> str: ...

    @property
    def volume_id(self) -> str: ...

    @property
    def nic_id(self) -> str: ...


def without(parts: describe.VmParts, params: DeviceParams) -> describe.VmParts:
    """Return the vm without the device."""
    return replace(
        parts,
        volumes=tuple(volume for volume in parts.volumes if volume.id != params.volume_id),
        nics=tuple(nic for nic in parts.nics if nic.id != params.nic_id),
    )


def left_of(params: DeviceParams, left: Sequence[ChangeLeft]) -> ChangeLeft | None:
    """Return what the guest has not done about this device; None where it is as it was asked for."""
    return next((each for each in left if each.device_id == (params.volume_id or params.nic_id)), None)


def require(session: Session, params: DeviceParams) -> None:
    """Raise Conflict where the vm does not have the device any more."""
    parts = describe.read_vm(session, params.vm_id)
    ids = {volume.id for volume in parts.volumes} | {nic.id for nic in parts.nics}
    if (params.volume_id or params.nic_id) not in ids:
        raise Conflict("device-not-attached", f"vm {parts.vm.name} does not have it any more")


def forget(session: Session, params: DeviceParams) -> None:
    """Take the device off the vm's rows; a volume and its space stay. Nothing where it is off already."""
    if params.nic_id:
        vms.delete_nic(session, params.nic_id)
        return
    try:
        volume = describe.get_volume(session, params.volume_id)
    except NotFound:
        return
    if volume.vm_id == params.vm_id:
        volume_claims.detach(session, [volume.id])


def tell(context: Transaction[Any], kind: str, verb: str) -> None:
    vm = vms.get(context.session, context.params.vm_id)
    device_id = context.params.volume_id or context.params.nic_id
    events.append(
        context.session,
        kind=kind,
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} {verb} {device_id}",
        context={"device_id": device_id},
        now=context.now,
    )
