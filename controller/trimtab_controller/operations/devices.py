"""What attaching and detaching have in common: the devices are a volume, a nic or both, named by the operation's params."""

from collections.abc import Collection, Sequence
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


def ids_of(params: DeviceParams) -> tuple[str, ...]:
    """Return the ids of what the operation is about, the volume first."""
    return tuple(each for each in (params.volume_id, params.nic_id) if each)


def without(parts: describe.VmParts, params: DeviceParams) -> describe.VmParts:
    """Return the vm without the devices."""
    return replace(
        parts,
        volumes=tuple(volume for volume in parts.volumes if volume.id != params.volume_id),
        nics=tuple(nic for nic in parts.nics if nic.id != params.nic_id),
    )


def left_of(params: DeviceParams, left: Sequence[ChangeLeft]) -> tuple[ChangeLeft, ...]:
    """Return what the guest has not done about these devices; empty where they are as it was asked for."""
    return tuple(each for each in left if each.device_id in ids_of(params))


def require(session: Session, params: DeviceParams) -> None:
    """Raise Conflict where the vm does not have the devices any more."""
    parts = describe.read_vm(session, params.vm_id)
    ids = {volume.id for volume in parts.volumes} | {nic.id for nic in parts.nics}
    if not ids.issuperset(ids_of(params)):
        raise Conflict("device-not-attached", f"vm {parts.vm.name} does not have it any more")


def forget(session: Session, params: DeviceParams, *, only: Collection[str] | None = None) -> None:
    """Take the devices (`only`: those of them) off the vm's rows; a volume and its space stay. Nothing where they are off already."""
    ids = [each for each in ids_of(params) if only is None or each in only]
    if params.nic_id in ids:
        vms.delete_nic(session, params.nic_id)
    if params.volume_id in ids:
        _forget_volume(session, params)


def _forget_volume(session: Session, params: DeviceParams) -> None:
    try:
        volume = describe.get_volume(session, params.volume_id)
    except NotFound:
        return
    if volume.vm_id == params.vm_id:
        volume_claims.detach(session, [volume.id])


def tell(context: Transaction[Any], kind: str, verb: str, *, device_ids: Sequence[str]) -> None:
    """Write an event for each of the devices."""
    vm = vms.get(context.session, context.params.vm_id)
    for device_id in device_ids:
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
