"""Accepts that a volume goes to another pool: what can be known beforehand is refused before anything changes.

Apart from the use case (`services/volume_moves.py`), since the steps of a plan begin moves too.
"""

from datetime import datetime

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Actor, Operation, Pool, Vm, Volume
from trimtab_controller.operations import move_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.encrypted import refuse_any
from trimtab_controller.operations.layer_refusals import refuse as refuse_layers
from trimtab_controller.store import describe, lookup, reach, schema, snapshots, vms, volume_moves
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity
from trimtab_protos.messages import Firmware

_OFF = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})


def accept_move(session: Session, volume: Volume, pool: Pool, *, bandwidth_mib_s: int, actor: Actor, now: datetime) -> Operation:
    """Accept the move of rows that were read in this transaction: the new place is claimed at once, the former until it is left.

    Conflict and InvalidRequest say why it cannot be, NoCapacity that there is no room.
    """
    refuse_volume(session, volume)
    _refuse(session, volume, pool)
    own = describe.get_pool(session, volume.pool_id)
    vm = vms.get(session, volume.vm_id) if volume.vm_id is not None else None
    host_id = _host(session, volume, own, pool, vm)
    if not volume_moves.begin(session, volume, pool, host_id, volume.format):
        raise NoCapacity(
            "pool-full",
            f"pool {pool.name} has no room for the {volume.size_bytes} bytes of volume {volume.name} beside its reserve; see "
            f"`trimtab pool get {pool.name}`",
        )
    return accept(
        session,
        "volume.move",
        subject_id=volume.vm_id or volume.id,
        subject_name=volume.name,
        project_id=volume.project_id,
        params={"volume_id": volume.id, "vm_id": volume.vm_id or "", "bandwidth_mib_s": bandwidth_mib_s},
        actor=actor,
        now=now,
    )


def refuse_volume(session: Session, volume: Volume) -> None:
    """Raise Conflict where the volume cannot go anywhere now."""
    if volume.observed_state != "present":
        raise Conflict("volume-not-ready", f"volume {volume.name} is {volume.observed_state}, not present yet")
    if volume.move_state:
        raise Conflict("volume-moving", f"volume {volume.name} is being moved already; see `trimtab volume get {volume.name}`")
    refuse_any((volume,), "moves between pools")
    refuse_block(describe.get_pool(session, volume.pool_id))
    refuse_layers(session, volume, verb="moved")
    if volume.layer_id or snapshots.layer_ids_of(session, [volume.id])[volume.id]:
        raise Conflict("volume-has-layers", f"layers of volume {volume.name} are still being merged; try again in a moment")
    if volume.vm_id is not None:
        _refuse_vm(session, volume, vms.get(session, volume.vm_id))


def _refuse(session: Session, volume: Volume, pool: Pool) -> None:
    """Raise Conflict where the volume cannot go to this pool."""
    refuse_block(pool)
    if volume.pool_id == pool.id:
        raise InvalidRequest("pool-same", f"to_pool: volume {volume.name} is in pool {pool.name} already", field="to_pool")
    if pool.is_shared and pool.sharing_proven_at is None:
        raise Conflict("pool-not-proven", f"pool {pool.name} is not proven to be shared; see `trimtab pool get {pool.name}`")
    own = describe.get_pool(session, volume.pool_id)
    vm = vms.get(session, volume.vm_id) if volume.vm_id is not None else None
    host_id = _host(session, volume, own, pool, vm)
    if not snapshots.is_known_to(session, host_id, "volume-move"):
        name = lookup.names(session, schema.host, [host_id]).get(host_id, host_id)
        raise Conflict("agent-too-old", f"the agent of host {name} cannot move volumes between pools; upgrade it first")


def refuse_block(pool: Pool) -> None:
    """Raise Conflict where nothing moves to or from the pool."""
    if pool.kind in describe.BLOCK_KINDS:
        raise Conflict(
            "pool-without-files",
            f"volumes do not move to or from pool {pool.name} of kind {pool.kind.value}: make one there, attach it, and copy in the guest",
        )


def _refuse_vm(session: Session, volume: Volume, vm: Vm) -> None:
    state = describe.state_volume(describe.volumes_of(session, vm.id))
    if state is None or state.id != volume.id:
        return
    if vm.drivers_image_id:
        raise Conflict(
            "drivers-inserted",
            f"the ISO with drivers of vm {vm.name} lies beside volume {volume.name}; "
            f"`trimtab vm update {vm.name} --no-drivers-iso` first",
        )
    if vm.cdrom_image_id:
        raise Conflict(
            "cdrom-inserted",
            f"the ISO in the drive of vm {vm.name} lies beside volume {volume.name}; `trimtab vm cdrom {vm.name} --eject` first",
        )
    if vm.firmware is Firmware.UEFI and vm.observed_state not in _OFF:
        raise Conflict(
            "nvram-in-use",
            f"the UEFI variables of vm {vm.name} lie beside volume {volume.name} and are in use; `trimtab vm stop {vm.name}` first",
        )


def _host(session: Session, volume: Volume, own: Pool, pool: Pool, vm: Vm | None) -> str:
    """Return the host that works on the move. Conflict where none reaches both pools."""
    if vm is not None and vm.host_id:
        if vm.host_id in {host.id for host in reach.ready_hosts(session, pool.id)}:
            return vm.host_id
        name = lookup.names(session, schema.host, [vm.host_id]).get(vm.host_id, vm.host_id)
        raise Conflict(
            "pool-not-there",
            f"to_pool: host {name}, the home of vm {vm.name}, does not reach pool {pool.name}; see `trimtab pool get {pool.name}`",
            field="to_pool",
        )
    host_id = move_steps.host_without_home(session, volume, own, pool)
    if not host_id:
        raise Conflict(
            "no-host-reaches-both",
            f"to_pool: no host that is up reaches both pool {own.name}, where volume {volume.name} is, and pool {pool.name}; "
            f"see `trimtab pool get {pool.name}`",
            field="to_pool",
        )
    return host_id
