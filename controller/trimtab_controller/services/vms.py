"""Creates vms and changes what is not power: one transaction from a request to the rows that the saga works on."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller import osinfo
from trimtab_controller.clock import mint
from trimtab_controller.core import architectures
from trimtab_controller.core.guest_os import Family, GuestOs, hardware_for
from trimtab_controller.core.ids import domain_uuid, kind_of
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Actor, Image, Network, Operation, Pool, Project, Role, Vm, Volume
from trimtab_controller.core.resize import Shape
from trimtab_controller.operations.accept import accept_placed
from trimtab_controller.services import (
    backup_policies,
    images,
    pools,
    quota,
    secgroups,
    seeds,
    start_groups,
    vm_cells,
    vm_groups,
    volume_keys,
    volumes,
)
from trimtab_controller.services.authorise import require
from trimtab_controller.services.vm_nics import NicWish, PlannedNic, insert_nic, plan_nic, require_spoofing
from trimtab_controller.services.vm_views import VmView
from trimtab_controller.store import events, hosts, hosts_read, lookup, schema, vms
from trimtab_controller.store import vm_groups as group_store
from trimtab_controller.store import volumes as volume_store
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NoCapacity, NotFound
from trimtab_protos.messages import DiskBus, DiskFormat, Firmware

VOLUME_NAME_MAX = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """What is asked for; '' and None take defaults."""

    name: str
    image: str
    volume: str
    vcpus: int
    vcpus_max: int | None
    # 0: what the operating system wants; then `os` names it.
    memory_mib: int
    memory_max_mib: int | None
    disk_bytes: int | None
    pool: str
    networks: tuple[NicWish, ...]
    firmware: str
    labels: Mapping[str, str]
    host_selector: Mapping[str, str]
    host_class: str
    arch: str
    cpu_model: str
    seed: seeds.SeedWish | None
    start: bool
    to_host: str
    # An ISO image to install from, onto an empty disk of `disk_bytes`.
    iso: str = ""
    # A family, or a name of osinfo's; '' is linux.
    os: str = ""
    has_tpm: bool = False
    has_secure_boot: bool = False
    # An ISO image in a second drive, with the drivers that the installer asks for.
    drivers_iso: str = ""
    # Least memory that the balloon leaves it, in MiB; 0: no balloon.
    balloon_min_mib: int = 0
    # low, normal, high; '' for none.
    cpu_class: str = ""
    # Its new disk lies encrypted.
    is_encrypted: bool = False
    # (key, value); the value '' stands for any.
    tolerations: tuple[tuple[str, str], ...] = ()
    # What operators count on hosts, by name.
    resources: Mapping[str, int] = field(default_factory=dict)
    # PCI devices of its host, by kind (`10de-20b0`).
    devices: Mapping[str, int] = field(default_factory=dict)
    # Each vcpu gets a cpu of its own, of those that hosts keep for it.
    is_dedicated: bool = False
    # Size of the huge pages behind all of its memory, in KiB; 0: ordinary memory.
    hugepages_kib: int = 0
    # NUMA cells that both are taken from, in equal shares.
    numa_cells: int = 1
    # A vm group of the project, by name or id; '' for none.
    group: str = ""
    # Security groups of the project, by name or id; none: anything may reach it.
    secgroups: tuple[str, ...] = ()
    ha: str = "none"
    """`restart`: started elsewhere when its host is proven off; `none`: left alone."""
    priority: int = 0
    """Higher ones are restarted first."""
    start_delay_s: int = 0
    """Seconds between the proof that its host is off and its restart; in a start group, after those of lower order run."""
    start_group: str = ""
    """A name within the project; '' for none."""
    start_order: int | None = None
    """Lower ones of the group start first; None: 0."""

    @property
    def wishes(self) -> dict[str, Any]:
        """What few vms ask for; only what is asked."""
        tolerations = [{"key": key, "value": value} for key, value in self.tolerations]
        wishes = {
            "tolerations": tolerations,
            "resources": dict(self.resources),
            "devices": dict(self.devices),
            "dedicated": self.is_dedicated,
            "hugepages_kib": self.hugepages_kib,
            "numa_cells": self.numa_cells if self.numa_cells != 1 else 0,
        }
        return {name: wish for name, wish in wishes.items() if wish}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Root:
    """What the vm boots from: a new clone of `image` in `pool`, or a volume that is there."""

    image: Image | None
    volume: Volume | None
    pool: Pool | None
    size_bytes: int
    iso: Image | None = None
    drivers: Image | None = None


def create(
    session: Session,
    spec: VmSpec,
    *,
    project: Project,
    actor: Actor,
    now: datetime,
    box: volume_keys.Sealer = volume_keys.NO_BOX,
) -> tuple[VmView, Operation]:
    """Insert the vm, its root volume and nics, charge the quota, and accept vm.create. Raises whatever refuses it, by field."""
    guest_os = osinfo.find(spec.os or Family.LINUX.value)
    spec = _with_memory(spec, guest_os)
    _check_shape(spec)
    _check_cells(spec)
    _require_arch(session, spec.arch)
    hardware = hardware_for(guest_os)
    root = _with_drivers(session, spec, _root(session, spec, project), project)
    to_host_id = resolve_host(session, spec.to_host, actor=actor)
    if spec.host_class and hosts.find_class(session, spec.host_class) is None:
        raise NotFound("host-class-not-found", f"host_class: there is no host class {spec.host_class}", field="host_class")
    group = vm_groups.find(session, spec.group, project=project, field="group") if spec.group else None
    vm_id = mint("vm")
    planned = _plan_cards(session, spec, vm_id, project=project, actor=actor, model=hardware.nic_model)
    disk_bytes = 0 if root.volume is not None else root.size_bytes
    quota.charge(session, project.id, quota.Charge(vms=1, vcpus=spec.vcpus, memory_mib=spec.memory_mib, disk_bytes=disk_bytes))
    seed = seeds.documents(spec.seed, vm_id=vm_id, vm_name=spec.name, nics=[one.told for one in planned])
    os_values = _os_values(spec, guest_os, root)
    if root.volume is not None and (seed or os_values["firmware"] == Firmware.UEFI):
        volumes.refuse_files_beside(session, root.volume)
    vm = vms.insert(
        session,
        **_vm_values(spec, vm_id=vm_id, project=project, root=root, now=now),
        **os_values,
        balloon_min_mib=spec.balloon_min_mib,
        cpu_class=spec.cpu_class,
        seed=seed,
    )
    if spec.secgroups:
        secgroups.put_into(session, vm_id, spec.secgroups, project=project, field="secgroups")
    if group is not None:
        group_store.add_member(session, group.id, vm_id)
    volume = _give_root(session, spec, root, vm_id=vm_id, project=project, bus=hardware.disk_bus, box=box, now=now)
    nics = tuple(insert_nic(session, one, now=now, field=f"networks[{one.nic.nic_index}]") for one in planned)
    operation = accept_placed(
        session,
        "vm.create",
        vm_id=vm_id,
        vm_name=spec.name,
        project_id=project.id,
        params={"start": spec.start},
        to_host_id=to_host_id,
        actor=actor,
        now=now,
    )
    named: list[Project | Image | Pool | Network | None] = [project, root.image, root.pool, root.iso, root.drivers]
    named += [one.network for one in planned]
    names = {one.id: one.name for one in named if one is not None}
    group_name = group.name if group is not None else ""
    view = VmView(
        vm=vm,
        volumes=(volume,),
        nics=nics,
        operation=operation,
        names=names,
        group_name=group_name,
        secgroups=tuple(sorted(set(spec.secgroups))),
    )
    return view, operation


def _plan_cards(
    session: Session, spec: VmSpec, vm_id: str, *, project: Project, actor: Actor, model: str
) -> tuple[PlannedNic, ...]:
    planned: tuple[PlannedNic, ...] = ()
    for i, wish in enumerate(spec.networks):
        require_spoofing(wish, actor)
        card = plan_nic(session, vm_id, i, wish, project=project, field=f"networks[{i}]", model=model, beside=planned)
        planned = (*planned, card)
    return planned


def change(
    session: Session,
    vm: Vm,
    *,
    labels: Mapping[str, str | None] | None,
    drain_policy: str | None,
    backup_policy: str | None = None,
    has_drivers_iso: bool = True,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> Vm:
    """Return the vm with these labels merged in (None takes a label away) and these policies; None leaves as it is.

    `has_drivers_iso` False: the drive with drivers is gone at its next start.
    """
    values: dict[str, Any] = {} if has_drivers_iso else {"drivers_image_id": ""}
    if labels is not None:
        values["labels"] = merge_labels(vm.labels, labels)
    if drain_policy is not None:
        values["drain_policy"] = drain_policy
    changed = sorted([*values, *(["backup_policy"] if backup_policy is not None else [])])
    if backup_policy is not None:
        values |= backup_policies.values_for(session, vm, backup_policy, now=now)
    lookup.update_version(session, schema.vm, f"vm {vm.name}", vm.id, expected_version=expected_version, **values)
    events.append(
        session,
        kind="vm.labels_changed" if changed == ["labels"] else "vm.changed",
        project_id=vm.project_id,
        subject_id=vm.id,
        actor=actor.name,
        message=f"{' and '.join(changed).replace('_', ' ')} of vm {vm.name} changed",
        now=now,
    )
    return vms.get(session, vm.id)


def merge_labels(before: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return the labels after a JSON merge patch. InvalidRequest beyond 64 of them."""
    merged = {key: value for key, value in {**before, **changes}.items() if value is not None}
    if len(merged) > 64:
        raise InvalidRequest("labels-too-many", f"labels: at most 64, this would make {len(merged)}", field="labels")
    return merged


def resolve_host(session: Session, name_or_id: str, *, actor: Actor) -> str:
    """Return the id of the host asked for, '' for none. Choosing a host takes the right to see hosts."""
    if not name_or_id:
        return ""
    require(actor, Role.VIEWER, "")
    host = hosts.find(session, name_or_id)
    if host is None:
        raise NotFound("host-not-found", f"to_host: there is no host {name_or_id}", field="to_host")
    return host.id


def _with_memory(spec: VmSpec, guest_os: GuestOs) -> VmSpec:
    """Return the wish with the memory that its system wants where it names the system and no memory."""
    if spec.memory_mib:
        return spec
    if not spec.os:
        raise InvalidRequest(
            "memory-missing", "memory_mib: give it, or os, whose own word about memory counts then", field="memory_mib"
        )
    return replace(spec, memory_mib=guest_os.memory_mib)


def _check_shape(spec: VmSpec) -> None:
    if kind_of(spec.name):
        raise InvalidRequest("name-like-an-id", f"name: {spec.name} looks like an id; choose a name", field="name")
    if [bool(spec.image), bool(spec.volume), bool(spec.iso)].count(True) != 1:
        raise InvalidRequest(
            "root-missing", "image: give either an image or a volume to boot from, or an ISO to install from", field="image"
        )
    if spec.volume and (spec.disk_bytes is not None or spec.pool):
        raise InvalidRequest(
            "root-fixed", "volume: it has its size and pool already; leave disk_bytes and pool out", field="volume"
        )
    if spec.volume and spec.is_encrypted:
        raise InvalidRequest(
            "root-fixed", "volume: it is encrypted already or never; leave is_encrypted out", field="is_encrypted"
        )
    if spec.vcpus_max is not None and spec.vcpus_max < spec.vcpus:
        raise InvalidRequest("vcpus-max", f"vcpus_max: at least vcpus ({spec.vcpus}), not {spec.vcpus_max}", field="vcpus_max")
    if spec.memory_max_mib is not None and spec.memory_max_mib < spec.memory_mib:
        raise InvalidRequest(
            "memory-max",
            f"memory_max_mib: at least memory_mib ({spec.memory_mib}), not {spec.memory_max_mib}",
            field="memory_max_mib",
        )


def _require_arch(session: Session, arch: str) -> None:
    """Refuse at once what no host of the fleet could run, whatever becomes free. The usual architecture is placement's to judge."""
    if arch == architectures.DEFAULT:
        return
    fleet = hosts_read.machines(session)
    if not any(architectures.can_run(host, arch) for host in fleet):
        raise NoCapacity(
            "arch-unavailable",
            f"arch: no host runs guests of {arch}; by architecture the hosts are: {architectures.tell(fleet)}; leave arch out",
            field="arch",
            hosts=architectures.tell(fleet),
        )


def _check_cells(spec: VmSpec) -> None:
    """Refuse pinned and huge-page vms that do not divide into their cells, or that could grow out of them while they run."""
    shape = Shape(spec.vcpus, spec.memory_mib)
    vm_cells.check_shape(shape, is_dedicated=spec.is_dedicated, hugepages_kib=spec.hugepages_kib, numa_cells=spec.numa_cells)
    if spec.is_dedicated and spec.vcpus_max not in (None, spec.vcpus):
        raise InvalidRequest("vcpus-max", "vcpus_max: dedicated cpus are fixed while it runs; leave it out", field="vcpus_max")
    if spec.balloon_min_mib:
        vm_cells.check_balloon(
            spec.balloon_min_mib,
            memory_mib=spec.memory_mib,
            memory_max_mib=spec.memory_max_mib or spec.memory_mib,
            has_pinned_pages=bool(spec.hugepages_kib or spec.devices),
        )
    if spec.hugepages_kib and spec.memory_max_mib not in (None, spec.memory_mib):
        message = "memory_max_mib: huge pages are fixed while it runs; leave it out"
        raise InvalidRequest("memory-max", message, field="memory_max_mib")


def _root(session: Session, spec: VmSpec, project: Project) -> _Root:
    if spec.volume:
        volume = volumes.find(session, spec.volume, project=project)
        if volume.vm_id is not None:
            raise Conflict("volume-attached", f"volume: {volume.name} belongs to a vm already", field="volume")
        if volume.observed_state != "present":
            raise Conflict(
                "volume-not-ready", f"volume: {volume.name} is {volume.observed_state}, not present yet", field="volume"
            )
        return _Root(image=None, volume=volume, pool=None, size_bytes=volume.size_bytes)
    if spec.iso:
        iso = images.ready_iso(session, spec.iso, project=project, field="iso")
        if spec.disk_bytes is None:
            raise InvalidRequest(
                "size-missing",
                "disk_bytes: give the size of the disk to install onto, for example 21474836480",
                field="disk_bytes",
            )
        return _Root(image=None, volume=None, pool=pools.choose(session, spec.pool), size_bytes=spec.disk_bytes, iso=iso)
    image = volumes.ready_disk(session, spec.image, project=project)
    pool = pools.choose(session, spec.pool)
    size_bytes = volumes.size_of(spec.disk_bytes, image, field="disk_bytes")
    return _Root(image=image, volume=None, pool=pool, size_bytes=size_bytes)


def _with_drivers(session: Session, spec: VmSpec, root: _Root, project: Project) -> _Root:
    if not spec.drivers_iso:
        return root
    return replace(root, drivers=images.ready_iso(session, spec.drivers_iso, project=project, field="drivers_iso"))


def _vm_values(spec: VmSpec, *, vm_id: str, project: Project, root: _Root, now: datetime) -> dict[str, Any]:
    start_group, start_order = start_groups.place(spec.start_group, spec.start_order)
    return {
        "id": vm_id,
        "uuid": str(uuid.UUID(domain_uuid(vm_id))),
        "project_id": project.id,
        "name": spec.name,
        "labels": dict(spec.labels),
        "arch": spec.arch,
        "cpu_model": spec.cpu_model,
        "cpu_features": [],
        "vcpus": spec.vcpus,
        "vcpus_max": spec.vcpus_max or spec.vcpus,
        "memory_mib": spec.memory_mib,
        "memory_max_mib": spec.memory_max_mib or spec.memory_mib,
        "device_addresses": {},
        "image_id": root.image.id if root.image else None,
        "host_selector": dict(spec.host_selector),
        "host_class": spec.host_class,
        "wishes": spec.wishes,
        "ha": spec.ha,
        "priority": spec.priority,
        "start_delay_s": spec.start_delay_s,
        "start_group": start_group,
        "start_order": start_order,
        "desired_power": (DesiredPower.RUNNING if spec.start else DesiredPower.STOPPED).value,
        "observed_state": ObservedState.ABSENT.value,
        "observed_at": now,
        "observed_addresses": [],
        "created_at": now,
    }


def _os_values(spec: VmSpec, guest_os: GuestOs, root: _Root) -> dict[str, Any]:
    """Return what follows from the operating system. InvalidRequest where what was asked for contradicts it."""
    firmware = spec.firmware or (Firmware.UEFI.value if spec.has_secure_boot else hardware_for(guest_os).firmware.value)
    if firmware == Firmware.BIOS and (spec.has_secure_boot or guest_os.needs_uefi):
        why = "secure boot needs" if spec.has_secure_boot else f"{guest_os.name} boots only by"
        raise InvalidRequest("firmware-wrong", f"firmware: {why} uefi; leave firmware out", field="firmware")
    if spec.has_tpm and spec.ha != "none":
        raise InvalidRequest(
            "tpm-keeps-home",
            "ha: a vm with a TPM cannot restart elsewhere, its TPM's state is on its host only; use `--ha none`",
            field="ha",
        )
    return {
        "firmware": firmware,
        "has_secure_boot": spec.has_secure_boot,
        "has_tpm": spec.has_tpm,
        "os": spec.os,
        "os_family": guest_os.family.value,
        "has_cdrom": root.iso is not None,
        "cdrom_image_id": root.iso.id if root.iso is not None else "",
        "drivers_image_id": root.drivers.id if root.drivers is not None else "",
    }


def _give_root(
    session: Session,
    spec: VmSpec,
    root: _Root,
    *,
    vm_id: str,
    project: Project,
    bus: DiskBus,
    box: volume_keys.Sealer,
    now: datetime,
) -> Volume:
    if root.volume is not None:
        return volume_store.attach(session, root.volume.id, vm_id=vm_id, disk_index=0, boot_order=1, bus=bus)
    assert root.pool is not None
    values = {
        "project_id": project.id,
        "pool_id": root.pool.id,
        "format": DiskFormat.QCOW2.value,
        "size_bytes": root.size_bytes,
        "base_image_id": root.image.id if root.image is not None else None,
        "bus": bus.value,
        "vm_id": vm_id,
        "disk_index": 0,
        "boot_order": 1,
        "is_deleted_with_vm": True,
        "is_encrypted": spec.is_encrypted,
    }
    volume = _insert_root(session, spec.name, vm_id, values, now)
    if spec.is_encrypted:
        volume_keys.add(session, volume.id, box, now=now)
    return volume


def _insert_root(session: Session, vm_name: str, vm_id: str, values: Mapping[str, Any], now: datetime) -> Volume:
    name = f"{vm_name}-root"
    if len(name) <= VOLUME_NAME_MAX:
        try:
            return volume_store.insert(session, volume_id=mint("vol"), now=now, name=name, **values)
        except AlreadyExists:
            pass  # a deleted vm of that name keeps its disk for undelete: take a piece of the new vm's id into the name
    tail = f"-root-{vm_id[-8:]}"
    name = f"{vm_name[: VOLUME_NAME_MAX - len(tail)]}{tail}"
    return volume_store.insert(session, volume_id=mint("vol"), now=now, name=name, **values)
