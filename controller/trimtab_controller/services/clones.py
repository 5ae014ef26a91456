"""Clones of vms: a snapshot of the source, and a vm of its own made of what that keeps.

Linked: its disks are empty layers over the source's, made in no time whatever their size; the source stays their base until the clone
is purged. Full: its disks are copies, and the snapshot goes once they are made.
"""

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.ids import domain_uuid, kind_of
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Nic, Operation, Project, Snapshot, Vm, Volume
from trimtab_controller.operations.accept import accept_placed
from trimtab_controller.services import quota, secgroups, seeds, snapshots
from trimtab_controller.services.vm_nics import NicWish, PlannedNic, insert_nic, plan_nic
from trimtab_controller.services.vm_power import Caller
from trimtab_controller.services.vm_views import VmView
from trimtab_controller.services.vms import VOLUME_NAME_MAX
from trimtab_controller.store import describe, vms
from trimtab_controller.store import snapshots as snapshot_store
from trimtab_controller.store import volumes as volume_store
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest
from trimtab_protos.messages import DiskFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneSpec:
    name: str
    is_linked: bool
    # One that the source has; '' takes one now.
    snapshot: str = ""
    start: bool = True


def clone(session: Session, source: Vm, caller: Caller, spec: CloneSpec, *, project: Project) -> tuple[VmView, Operation]:
    """Insert a vm like `source` under another identity, and accept its making. Raises what refuses it, by field."""
    if kind_of(spec.name):
        raise InvalidRequest("name-like-an-id", f"name: {spec.name} looks like an id; choose a name", field="name")
    disks = describe.read_disks(session, source.id)
    disk_bytes = sum(volume.size_bytes for volume in disks.volumes)
    charge = quota.Charge(vms=1, vcpus=source.vcpus, memory_mib=source.memory_mib, disk_bytes=disk_bytes)
    quota.charge(session, project.id, charge)
    vm_id, operation_id = mint("vm"), mint("op")
    planned: list[PlannedNic] = []
    for nic in vms.nics_of(session, [source.id])[source.id]:
        wish = NicWish(network=nic.network_id)
        planned.append(
            plan_nic(session, vm_id, nic.nic_index, wish, project=project, field="name", model=nic.model, beside=planned)
        )
    seed = seeds.for_clone(source.seed, vm_id=vm_id, vm_name=spec.name, nics=[one.told for one in planned])
    vm = vms.insert(session, **_vm_values(source, spec, vm_id=vm_id, caller=caller), seed=seed)
    kept, snapshot_operation = _source_layers(session, source, caller, spec, wakes=operation_id, vm_id=vm_id)
    secgroups.copy(session, source.id, vm_id)
    volumes = [_volume(session, volume, spec, kept, vm=vm, caller=caller) for volume in disks.volumes]
    nics: list[Nic] = [insert_nic(session, one, now=caller.now, field="name") for one in planned]
    is_local = any(not disks.pools[volume.pool_id].is_shared for volume in disks.volumes)
    if is_local and not source.host_id:
        raise Conflict("vm-not-placed", f"vm {source.name} is on no host; start it with `trimtab vm start {source.name}` first")
    to_host_id = source.host_id if is_local else ""
    copies = {} if spec.is_linked else {new.id: [old.id, kept.layers[old.id]] for new, old in volumes}
    operation = accept_placed(
        session,
        "vm.create",
        vm_id=vm_id,
        vm_name=vm.name,
        project_id=project.id,
        params={
            "start": spec.start,
            "after_operation_id": snapshot_operation,
            "snapshot_id": kept.snapshot.id,
            "copies": copies,
        },
        to_host_id=to_host_id,
        actor=caller.actor,
        now=caller.now,
        operation_id=operation_id,
    )
    names = {project.id: project.name, **{pool.id: pool.name for pool in disks.pools.values()}}
    names |= {one.network.id: one.network.name for one in planned}
    view = VmView(vm=vm, volumes=tuple(new for new, _old in volumes), nics=tuple(nics), operation=operation, names=names)
    return view, operation


@dataclass(frozen=True, slots=True)
class _Kept:
    snapshot: Snapshot
    # Of the source: volume id → the layer that the snapshot keeps.
    layers: dict[str, str]


def _source_layers(session: Session, source: Vm, caller: Caller, spec: CloneSpec, *, wakes: str, vm_id: str) -> tuple[_Kept, str]:
    """Return what the clone is made of, and the operation that takes the snapshot, '' where there is one already."""
    operation_id = ""
    if spec.snapshot:
        snapshots.refuse_clones_of_images(session, source)
        snapshot = snapshots.find(session, source, spec.snapshot)
        if snapshot.state != "ready":
            raise Conflict("snapshot-not-ready", f"snapshot: {snapshot.name} is {snapshot.state}", field="snapshot")
        if {str(one["volume_id"]) for one in snapshot.volumes} != {one.id for one in describe.volumes_of(session, source.id)}:
            raise Conflict("snapshot-disks-differ", f"snapshot: vm {source.name} has other disks now", field="snapshot")
    else:
        name = f"clone-{vm_id[-12:]}"
        operation = snapshots.create(session, source, caller, name=name, is_temporary=True, wakes=wakes)
        operation_id = operation.id
        snapshot = snapshot_store.get(session, str(operation.params["snapshot_id"]))
    return _Kept(snapshot, {str(one["volume_id"]): str(one["layer_id"]) for one in snapshot.volumes}), operation_id


def _volume(session: Session, source: Volume, spec: CloneSpec, kept: _Kept, *, vm: Vm, caller: Caller) -> tuple[Volume, Volume]:
    """Insert the clone's volume; return it with the one that it is made of."""
    values: dict[str, Any] = {
        "project_id": vm.project_id,
        "pool_id": source.pool_id,
        "format": DiskFormat.QCOW2.value,
        "size_bytes": source.size_bytes,
        "base_image_id": None,
        "bus": source.bus.value,
        "vm_id": vm.id,
        "disk_index": source.disk_index,
        "boot_order": source.boot_order,
        "is_read_only": source.is_read_only,
        "iops_limit": source.iops_limit,
        "bandwidth_limit_mib_s": source.bandwidth_limit_mib_s,
        "is_deleted_with_vm": True,
    }
    if spec.is_linked:
        values |= {"parent_volume_id": source.id, "parent_layer_id": kept.layers[source.id]}
    part = "root" if source.boot_order == 1 else f"disk{source.disk_index}"
    for tail in (f"-{part}", f"-{part}-{vm.id[-8:]}"):
        try:
            name = f"{spec.name[: VOLUME_NAME_MAX - len(tail)]}{tail}"
            return volume_store.insert(session, volume_id=mint("vol"), now=caller.now, name=name, **values), source
        except AlreadyExists:
            continue  # a deleted vm of that name keeps its disk for undelete
    raise AlreadyExists("volume-exists", f"name: a volume is called {name} already; choose another name", field="name")


def _vm_values(source: Vm, spec: CloneSpec, *, vm_id: str, caller: Caller) -> dict[str, Any]:
    """Return what a clone has from its source: everything but its identity, its TPM's secrets and what is in its drive."""
    return {
        "id": vm_id,
        "uuid": str(uuid.UUID(domain_uuid(vm_id))),
        "project_id": source.project_id,
        "name": spec.name,
        "labels": dict(source.labels),
        "arch": source.arch,
        "machine": source.machine,
        "cpu_model": source.cpu_model,
        "cpu_features": list(source.cpu_features),
        "vcpus": source.vcpus,
        "vcpus_max": source.vcpus_max,
        "memory_mib": source.memory_mib,
        "memory_max_mib": source.memory_max_mib,
        "balloon_min_mib": source.balloon_min_mib,
        "cpu_class": source.cpu_class,
        "firmware": source.firmware.value,
        "has_secure_boot": source.has_secure_boot,
        "has_tpm": source.has_tpm,
        "os": source.os,
        "os_family": source.os_family,
        "has_cdrom": source.has_cdrom,
        "device_addresses": {},
        "image_id": source.image_id,
        "template_id": source.template_id,
        "host_selector": dict(source.host_selector),
        "host_class": source.host_class,
        "wishes": dict(source.wishes),
        "ha": source.ha,
        "priority": source.priority,
        "start_delay_s": source.start_delay_s,
        "start_group": source.start_group,
        "start_order": source.start_order,
        "drain_policy": source.drain_policy,
        "desired_power": (DesiredPower.RUNNING if spec.start else DesiredPower.STOPPED).value,
        "observed_state": ObservedState.ABSENT.value,
        "observed_at": caller.now,
        "observed_addresses": [],
        "created_at": caller.now,
    }
