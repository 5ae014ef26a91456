"""Snapshots of vms: what may be asked, and the rows and the operation of it in one transaction."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.layers import MAX_LAYERS
from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Operation, Snapshot, Vm, Volume
from trimtab_controller.operations.encrypted import refuse_any
from trimtab_controller.services import quota
from trimtab_controller.services.vm_power import Caller, accept_on_vm
from trimtab_controller.store import describe, lookup, operations, schema, snapshots, volume_claims
from trimtab_protos.errors import AlreadyExists, Conflict, NoCapacity, NotFound
from trimtab_protos.messages import DiskFormat, PoolKind

OFF = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotView:
    snapshot: Snapshot
    # '' at the root of the tree.
    parent_name: str
    # What the vm writes now began from it.
    is_current: bool
    # Linked clones that lie over it, by vm.
    clones: tuple[str, ...]


def create(
    session: Session,
    vm: Vm,
    caller: Caller,
    *,
    name: str,
    has_memory: bool = False,
    is_temporary: bool = False,
    wakes: str = "",
) -> Operation:
    """Accept a snapshot. Conflict names what stands against it and the next command."""
    volumes = _layered_volumes(session, vm)
    if is_temporary:
        refuse_clones_of_images(session, vm)
    if has_memory:
        _refuse_images(session, vm, what="memory is not kept beside it", cure="Leave --memory out: the disks are kept alone")
    if has_memory and vm.observed_state in OFF:
        raise Conflict(
            "vm-not-running",
            f"has_memory: vm {vm.name} is {vm.observed_state.value} and has no memory to keep; leave --memory out",
            field="has_memory",
        )
    if not snapshots.is_known_to(session, vm.host_id):
        raise Conflict(
            "not-supported-here", f"the agent on the host of vm {vm.name} is of a release without snapshots; upgrade it first"
        )
    _require_room(session, vm, volumes, memory_bytes=vm.memory_mib << 20 if has_memory else 0)
    _refuse_unfinished(session, vm)
    _check_version(session, vm, caller)
    if not is_temporary:
        quota.charge(session, vm.project_id, quota.Charge(snapshots=1))
    snapshot_id = mint("snap")
    layers = _new_layers(session, volumes, caller)
    try:
        snapshots.insert(
            session,
            snapshot_id=snapshot_id,
            now=caller.now,
            vm_id=vm.id,
            name=name,
            parent_id=vm.current_snapshot_id or None,
            state="making",
            has_memory=has_memory,
            is_temporary=is_temporary,
            vcpus=vm.vcpus,
            memory_mib=vm.memory_mib,
            volumes=[
                {"volume_id": one.id, "layer_id": one.layer_id, "size_bytes": one.size_bytes, "generation": one.generation}
                for one in volumes
            ],
        )
    except AlreadyExists as error:
        hint = f"choose another name, or `trimtab vm snapshot delete {vm.name} {name}`"
        raise AlreadyExists("snapshot-exists", f"name: vm {vm.name} has a snapshot {name} already; {hint}", name=name) from error
    params = {"snapshot_id": snapshot_id, "layers": layers, "has_memory": has_memory, "wakes": wakes}
    return accept_on_vm(session, vm, caller, "snapshot.create", params)


def revert(session: Session, vm: Vm, caller: Caller, snapshot: Snapshot, *, disk_only: bool = False) -> Operation:
    """Accept that the vm goes back. Conflict where it has other disks or another shape than then."""
    volumes = _layered_volumes(session, vm)
    _refuse_unfinished(session, vm)
    is_running = vm.observed_state not in OFF
    with_memory = snapshot.has_memory and not disk_only
    if with_memory:
        _refuse_memory(vm, snapshot, is_running=is_running)
    _refuse_other_disks(vm, snapshot, volumes)
    _check_version(session, vm, caller)
    kept = {str(one["volume_id"]): str(one["layer_id"]) for one in snapshot.volumes}
    layers = {volume.id: mint("lay") for volume in volumes}
    for volume_id, layer_id in layers.items():
        snapshots.insert_layer(session, layer_id=layer_id, volume_id=volume_id, over=kept[volume_id], now=caller.now)
    params = {"snapshot_id": snapshot.id, "layers": layers, "should_run": is_running, "with_memory": with_memory}
    return accept_on_vm(session, vm, caller, "snapshot.revert", params)


def delete(session: Session, vm: Vm, caller: Caller, snapshot: Snapshot) -> Operation:
    """Accept that the snapshot goes. Conflict where linked clones lie over it, or would have to lie elsewhere."""
    clones = snapshots.clones_of(session, snapshot)
    if clones:
        names = ", ".join(sorted({clone.vm_name or clone.volume_name for clone in clones}))
        raise Conflict(
            "snapshot-has-clones",
            f"snapshot {snapshot.name} of vm {vm.name} is the base of linked clones: {names}; they hold on to it until they "
            f"are purged, 24 h after `trimtab vm delete` or by `trimtab vm purge`",
            clones=names,
        )
    # One that was cut short while it was made is no obstacle; of one that was half deleted the rows say more than there is.
    _refuse_unfinished(session, vm, states=("deleting",), but=snapshot.id)
    _check_version(session, vm, caller)
    return accept_on_vm(session, vm, caller, "snapshot.delete", {"snapshot_id": snapshot.id})


# --- reading -----------------------------------------------------------------------------------------------------------------


def find(session: Session, vm: Vm, name_or_id: str) -> Snapshot:
    for snapshot in snapshots.of_vm(session, vm.id):
        if name_or_id in {snapshot.name, snapshot.id}:
            return snapshot
    known = ", ".join(one.name for one in snapshots.of_vm(session, vm.id)) or "it has none"
    raise NotFound(
        "snapshot-not-found", f"vm {vm.name} has no snapshot {name_or_id}; its snapshots: {known}", snapshot=name_or_id
    )


def views(session: Session, vm: Vm) -> tuple[SnapshotView, ...]:
    """Return the vm's snapshots, each after the one that it began from."""
    found = snapshots.of_vm(session, vm.id)
    names = {one.id: one.name for one in found}
    return tuple(
        SnapshotView(
            snapshot=one,
            parent_name=names.get(one.parent_id or "", ""),
            is_current=one.id == vm.current_snapshot_id,
            clones=tuple(sorted({clone.vm_name or clone.volume_name for clone in snapshots.clones_of(session, one)})),
        )
        for one in _parents_first(found)
    )


def _parents_first(found: Sequence[Snapshot]) -> list[Snapshot]:
    """Return the tree depth first, the oldest branch first."""
    known = {one.id for one in found}

    def below(parent: str | None) -> list[Snapshot]:
        children = [one for one in found if (one.parent_id if one.parent_id in known else None) == parent]
        return [each for one in children for each in (one, *below(one.id))]

    return below(None)


# --- what stands against it -------------------------------------------------------------------------------------------------------


def _layered_volumes(session: Session, vm: Vm) -> tuple[Volume, ...]:
    volumes = describe.volumes_of(session, vm.id)
    if not volumes:
        raise Conflict("vm-has-no-disks", f"vm {vm.name} has no disk to keep")
    refuse_any(volumes, "snapshots and clones")
    kinds = _pool_kinds(session, volumes)
    for volume in volumes:
        if volume.format is not DiskFormat.QCOW2 and kinds[volume.pool_id] is not PoolKind.RBD:
            raise _no_layers(vm, volume, kinds[volume.pool_id])
    if PoolKind.RBD in kinds.values() and not snapshots.is_known_to(session, vm.host_id, "rbd-layers"):
        message = f"the agent on the host of vm {vm.name} is of a release without snapshots of Ceph images; upgrade it first"
        raise Conflict("not-supported-here", message)
    absent = next((one for one in volumes if one.observed_state != "present"), None)
    if absent is not None:
        raise Conflict("volume-not-ready", f"volume {absent.name} is {absent.observed_state}, not present yet")
    return volumes


def _pool_kinds(session: Session, volumes: Sequence[Volume]) -> dict[str, PoolKind]:
    return {pool_id: describe.get_pool(session, pool_id).kind for pool_id in {one.pool_id for one in volumes}}


def _no_layers(vm: Vm, volume: Volume, kind: PoolKind) -> Conflict:
    """Return why the volume cannot be kept as it is at an instant, with what does instead."""
    match kind:
        case PoolKind.ISCSI:
            what = "is a LUN, of which only its own server makes snapshots"
        case PoolKind.LVM_THIN:
            what = "is a logical volume, of which Trimtab makes no snapshots"
        case _:
            what = f"is {volume.format.value}, and only qcow2 volumes and Ceph images can be kept as they are at an instant"
    return Conflict(
        "volume-not-qcow2",
        f"volume {volume.name} of vm {vm.name} {what}. "
        f"`trimtab backup run {vm.name}` keeps it elsewhere, `trimtab backup restore BACKUP --as NAME --instant` makes another vm of "
        f"that; `trimtab vm detach {vm.name} --volume {volume.name}` leaves it out",
    )


def refuse_clones_of_images(session: Session, vm: Vm) -> None:
    """Raise Conflict where a disk is an image of a Ceph pool: no clone or template is made of one."""
    cure = f"`trimtab backup run {vm.name}`, then `trimtab backup restore BACKUP --as NAME` makes another vm of it"
    _refuse_images(session, vm, what="no clones or templates are made of it", cure=cure)


def _refuse_images(session: Session, vm: Vm, *, what: str, cure: str) -> None:
    """Raise Conflict where a disk is an image of a Ceph pool: it keeps states of its own and is the base of nothing else."""
    volumes = describe.volumes_of(session, vm.id)
    kinds = _pool_kinds(session, volumes)
    found = next((one for one in volumes if kinds[one.pool_id] is PoolKind.RBD), None)
    if found is not None:
        raise Conflict("volume-is-image", f"volume {found.name} of vm {vm.name} is an image of a Ceph pool: {what}. {cure}")


def _require_room(session: Session, vm: Vm, volumes: Sequence[Volume], *, memory_bytes: int) -> None:
    """Refuse where what a disk writes from now on would eat the pool's reserve: a snapshot lets it grow beyond what it claims."""
    home = describe.state_volume(volumes)
    for volume in volumes:
        pool = describe.get_pool(session, volume.pool_id)
        room = volume_claims.room_bytes(session, pool, volume.host_id)
        needed = memory_bytes if home is not None and volume.id == home.id else 0
        if room is not None and room <= needed:
            what = f"{needed} bytes of memory beside its reserve" if needed else "more beside its reserve"
            raise NoCapacity(
                "pool-full",
                f"pool {pool.name} has no room for {what}; `trimtab vm snapshot delete {vm.name} NAME` gives back what a snapshot "
                f"keeps, `trimtab pool get {pool.name}` shows the space",
                free_bytes=room,
            )


def _refuse_unfinished(session: Session, vm: Vm, *, states: Sequence[str] = ("making", "deleting"), but: str = "") -> None:
    """Layers that a cut left half way are put in order first."""
    found = snapshots.of_vm(session, vm.id)
    half = next((one for one in found if one.state in states and one.id != but), None)
    if half is not None and operations.live_exclusive(session, vm.id) is None:
        raise Conflict(
            "snapshot-unfinished",
            f"snapshot {half.name} of vm {vm.name} was cut short while {half.state}; "
            f"`trimtab vm snapshot delete {vm.name} {half.name}` puts it in order",
            snapshot=half.name,
        )


def _refuse_memory(vm: Vm, snapshot: Snapshot, *, is_running: bool) -> None:
    if not is_running:
        raise Conflict(
            "vm-not-running",
            f"vm {vm.name} is {vm.observed_state.value} and has no place to run; `trimtab vm start {vm.name}` first, or go back to "
            f"the disks alone with --disk-only",
        )
    if (vm.vcpus, vm.memory_mib) != (snapshot.vcpus, snapshot.memory_mib):
        raise Conflict(
            "snapshot-shape-differs",
            f"snapshot {snapshot.name} keeps the memory of a vm with {snapshot.vcpus} vcpus and {snapshot.memory_mib} MiB, "
            f"{vm.name} has {vm.vcpus} and {vm.memory_mib}; "
            f"`trimtab vm resize {vm.name} --vcpus {snapshot.vcpus} --memory {snapshot.memory_mib}MiB` first, or --disk-only",
        )


def _refuse_other_disks(vm: Vm, snapshot: Snapshot, volumes: Sequence[Volume]) -> None:
    kept = {str(one["volume_id"]) for one in snapshot.volumes}
    new = next((one for one in volumes if one.id not in kept), None)
    if new is not None:
        raise Conflict(
            "snapshot-disks-differ",
            f"volume {new.name} came to vm {vm.name} after snapshot {snapshot.name}; "
            f"`trimtab vm detach {vm.name} --volume {new.name}` first",
        )


def _new_layers(session: Session, volumes: Sequence[Volume], caller: Caller) -> dict[str, str]:
    known = snapshots.layer_ids_of(session, [one.id for one in volumes])
    full = next((one for one in volumes if len(known[one.id]) >= MAX_LAYERS), None)
    if full is not None:
        raise Conflict(
            "layers-too-many",
            f"volume {full.name} has {MAX_LAYERS} layers, as many as a guest may read through; delete a snapshot first",
            bound=MAX_LAYERS,
        )
    layers = {volume.id: mint("lay") for volume in volumes}
    snapshots.insert_layers(session, layers, volumes, now=caller.now)
    return layers


def _check_version(session: Session, vm: Vm, caller: Caller) -> None:
    if caller.expected_version is not None:
        lookup.update_version(session, schema.vm, f"vm {vm.name}", vm.id, expected_version=caller.expected_version)
