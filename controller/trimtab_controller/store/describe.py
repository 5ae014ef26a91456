"""Builds what agents are told about a vm from what SQL says: one snapshot, read in one go."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core import cpu_sets, guest_os, guest_resources
from trimtab_controller.core.model import Image, Network, Nic, Pool, Vm, Volume
from trimtab_controller.store import schema, secgroups, vms, wires
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.codec import from_json
from trimtab_protos.device_messages import CdromSpec
from trimtab_protos.errors import NotFound
from trimtab_protos.messages import (
    DiskFormat,
    DiskSpec,
    DomainSpec,
    NetworkKind,
    NetworkSpec,
    NicSpec,
    PoolKind,
    PoolSpec,
    SeedSpec,
    VolumeSpec,
)
from trimtab_protos.pool_messages import IscsiSource, LvmSource, NfsSource, RbdSource

T = TypeVar("T")

_VOLUMES = (
    sa.select(*columns_of(schema.volume, Volume))
    .where(schema.volume.c.vm_id == sa.bindparam("vm_id"))
    .order_by(schema.volume.c.disk_index)
)
_PROJECT_NAME = sa.select(schema.project.c.name).where(schema.project.c.id == sa.bindparam("project_id"))
_BRIDGE_ON_HOST = sa.select(schema.network_host.c.bridge).where(
    schema.network_host.c.network_id == sa.bindparam("network_id"), schema.network_host.c.host_id == sa.bindparam("host_id")
)

_HELD_CELLS = sa.select(schema.claim_stock.c.resource).where(
    schema.claim_stock.c.vm_id == sa.bindparam("of_vm"),
    schema.claim_stock.c.host_id == sa.bindparam("of_host"),
    schema.claim_stock.c.resource.startswith("cell:"),
)
_HELD_DEVICES = sa.select(schema.claim_stock.c.resource).where(
    schema.claim_stock.c.vm_id == sa.bindparam("of_vm"),
    schema.claim_stock.c.host_id == sa.bindparam("of_host"),
    schema.claim_stock.c.resource.startswith("pci:"),
)
_CPU_CLASSES = (
    sa.select(schema.host_class.c.cpu_classes)
    .join(schema.host, schema.host.c.host_class_id == schema.host_class.c.id)
    .where(schema.host.c.id == sa.bindparam("of_host"))
)
_CPUS_OF_HOST = sa.select(schema.host.c.inventory, schema.host.c.dedicated_cpus).where(
    schema.host.c.id == sa.bindparam("of_host")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmDisks:
    """A vm's volumes with where they are and what they are clones of."""

    volumes: tuple[Volume, ...]
    pools: Mapping[str, Pool]
    images: Mapping[str, Image]


@dataclass(frozen=True, slots=True, kw_only=True)
class VmParts:
    """A vm with all that belongs to it."""

    vm: Vm
    project_name: str
    volumes: tuple[Volume, ...]
    nics: tuple[Nic, ...]
    pools: Mapping[str, Pool]
    images: Mapping[str, Image]
    networks: Mapping[str, Network]

    def pool_specs(self) -> tuple[PoolSpec, ...]:
        return tuple(pool_spec(pool) for pool in self.pools.values())

    @property
    def local_volumes(self) -> tuple[Volume, ...]:
        return tuple(volume for volume in self.volumes if not self.pools[volume.pool_id].is_shared)


def read_vm(session: Session, vm_id: str) -> VmParts:
    """Return the vm and its parts. NotFound where the row is gone."""
    vm = vms.get(session, vm_id)
    disks = read_disks(session, vm_id)
    nics = vms.nics_of(session, [vm_id])[vm_id]
    project_name = session.execute(_PROJECT_NAME, {"project_id": vm.project_id}).scalar_one()
    return VmParts(
        vm=vm,
        project_name=project_name,
        volumes=disks.volumes,
        nics=nics,
        pools=disks.pools,
        images=disks.images,
        networks=_by_id(session, schema.network, Network, {nic.network_id for nic in nics}),
    )


def read_disks(session: Session, vm_id: str) -> VmDisks:
    """Return the vm's disks in order; none where the row is gone."""
    volumes = volumes_of(session, vm_id)
    image_ids = {volume.base_image_id for volume in volumes if volume.base_image_id}
    return VmDisks(
        volumes=volumes,
        pools=_by_id(session, schema.pool, Pool, {pool_id for volume in volumes for pool_id in pool_ids_of(volume)}),
        images=_by_id(session, schema.image, Image, image_ids),
    )


def pool_ids_of(volume: Volume) -> tuple[str, ...]:
    """Return the pools in which a guest that starts may find the volume."""
    is_going = volume.move_state == "going" and volume.other_pool_id is not None
    return (volume.pool_id, volume.other_pool_id) if is_going and volume.other_pool_id else (volume.pool_id,)


def volumes_of(session: Session, vm_id: str) -> tuple[Volume, ...]:
    """Return the vm's disks in order."""
    return tuple(build(Volume, row) for row in session.execute(_VOLUMES, {"vm_id": vm_id}))


def get_pool(session: Session, pool_id: str) -> Pool:
    return _one(session, schema.pool, Pool, pool_id)


def get_image(session: Session, image_id: str) -> Image:
    return _one(session, schema.image, Image, image_id)


def get_volume(session: Session, volume_id: str) -> Volume:
    return _one(session, schema.volume, Volume, volume_id)


def get_network(session: Session, network_id: str) -> Network:
    return _one(session, schema.network, Network, network_id)


def pool_spec(pool: Pool) -> PoolSpec:
    def behind(kind: PoolKind, target: type[T]) -> T | None:
        return from_json(dict(pool.settings), target) if pool.kind is kind else None

    return PoolSpec(
        pool_id=pool.id,
        path=pool.path,
        name=pool.name,
        kind=pool.kind,
        is_shared=pool.is_shared,
        nfs=behind(PoolKind.NFS, NfsSource),
        iscsi=behind(PoolKind.ISCSI, IscsiSource),
        lvm=behind(PoolKind.LVM_THIN, LvmSource),
        rbd=behind(PoolKind.RBD, RbdSource),
    )


def volume_spec(volume: Volume, images: Mapping[str, Image]) -> VolumeSpec:
    base = images.get(volume.base_image_id or "")
    if volume.is_encrypted:
        return VolumeSpec(
            volume_id=volume.id,
            pool_id=volume.pool_id,
            format=volume.format,
            size_bytes=volume.size_bytes,
            # Until it is there: an encrypted volume lies over nothing.
            copy_image_id=base.id if base else "",
            generation=volume.generation,
            is_encrypted=True,
        )
    return VolumeSpec(
        volume_id=volume.id,
        pool_id=volume.pool_id,
        format=volume.format,
        size_bytes=volume.size_bytes,
        base_image_id=base.id if base else "",
        base_image_format=stored_format(base) if base else None,
        generation=volume.generation,
        base_volume_id=volume.parent_volume_id or "",
        base_layer_id=volume.parent_layer_id,
        unit=volume.unit,
    )


def alone(spec: VolumeSpec) -> VolumeSpec:
    """Return the volume as a file that lies over nothing."""
    return replace(spec, base_image_id="", base_image_format=None, base_volume_id="", base_layer_id="")


def layer_spec(volume: Volume, layer_id: str, *, over: str) -> VolumeSpec:
    """Return an empty layer of the volume over one that it has."""
    return VolumeSpec(
        volume_id=volume.id,
        pool_id=volume.pool_id,
        format=volume.format,
        size_bytes=volume.size_bytes,
        generation=volume.generation,
        layer_id=layer_id,
        base_volume_id=volume.id,
        base_layer_id=over,
    )


def stored_format(image: Image) -> DiskFormat:
    """Return the format of a replica's file: imports store disks as qcow2 whatever they came as; an ISO stays one."""
    return DiskFormat.ISO if image.kind == "iso" else DiskFormat.QCOW2


def network_spec(session: Session, network: Network, host_id: str) -> NetworkSpec:
    """Return the network as it is on this host: a mapping of the host's own wins over the network's bridge."""
    mapped = session.execute(_BRIDGE_ON_HOST, {"network_id": network.id, "host_id": host_id}).scalar_one_or_none()
    kind = NetworkKind.BRIDGE if network.kind in {"bridge", "vlan"} else NetworkKind(network.kind)
    return NetworkSpec(
        network_id=network.id,
        kind=kind,
        name=network.name,
        bridge=mapped or network.bridge,
        vlan=network.vlan,
        mtu=network.mtu,
        subnet=network.subnet,
        has_dhcp=network.has_dhcp,
        is_outer="outer" in network.settings,
        keeps_groups=network.kind == "overlay",
    )


def domain_spec(session: Session, parts: VmParts, host_id: str) -> DomainSpec:
    """Return the vm as it shall be defined on this host."""
    vm = parts.vm
    page_kib, cells, cpuset = _cells(session, vm, host_id)
    networks = tuple(network_spec(session, network, host_id) for network in parts.networks.values())
    wired = wires.nics_of(vm)
    return DomainSpec(
        vm_id=vm.id,
        uuid=vm.uuid,
        name=vm.name,
        project=parts.project_name,
        arch=vm.arch,
        machine=vm.machine,
        cpu_model=vm.cpu_model,
        cpu_features=vm.cpu_features,
        vcpus=vm.vcpus,
        vcpus_max=vm.vcpus_max,
        memory_mib=vm.memory_mib,
        memory_max_mib=vm.memory_max_mib,
        firmware=vm.firmware,
        has_secure_boot=vm.has_secure_boot,
        disks=tuple(_disk(volume) for volume in parts.volumes),
        nics=(*(_nic(nic) for nic in parts.nics), *wired),
        seed=_seed(vm.seed),
        networks=(*networks, wires.NETWORK) if wired else networks,
        pools=parts.pool_specs(),
        cdrom=_cdrom(parts),
        has_tpm=vm.has_tpm,
        has_local_time_clock=guest_os.takes_local_time(vm.os_family),
        has_hyperv=guest_os.has_enlightenments(vm.os_family),
        page_kib=page_kib,
        numa_cells=cells,
        cpuset=cpuset,
        host_devices=_host_devices(session, vm, host_id),
        firewall=secgroups.firewall_of(session, vm.id),
        is_kept=vm.ha == "restart",
        resources=guest_resources.resources_of(vm, _cpu_classes(session, vm, host_id)),
        drivers=_drivers(parts),
    )


def _cpu_classes(session: Session, vm: Vm, host_id: str) -> Mapping[str, Any]:
    """Return what classes of cpu time mean on the host; most vms have none, and cost no query."""
    return session.execute(_CPU_CLASSES, {"of_host": host_id}).scalar_one_or_none() or {} if vm.cpu_class else {}


def _host_devices(session: Session, vm: Vm, host_id: str) -> tuple[str, ...]:
    """Return the addresses of the devices that the vm holds there."""
    if not vm.wishes.get("devices"):
        return ()
    held = session.scalars(_HELD_DEVICES, {"of_vm": vm.id, "of_host": host_id})
    return tuple(sorted(resource.split(":", 2)[2] for resource in held))


def _cells(session: Session, vm: Vm, host_id: str) -> tuple[int, tuple[int, ...], str]:
    """Return the size of its huge pages, the cells that it holds on the host, and the cpus kept for pinned vms in them."""
    page_kib, is_dedicated = int(vm.wishes.get("hugepages_kib", 0)), bool(vm.wishes.get("dedicated", False))
    if not page_kib and not is_dedicated:
        return 0, (), ""
    held = session.scalars(_HELD_CELLS, {"of_vm": vm.id, "of_host": host_id})
    cells = tuple(sorted({int(resource.split(":")[1]) for resource in held}))
    if not is_dedicated or not cells:
        return page_kib, cells, ""
    host = session.execute(_CPUS_OF_HOST, {"of_host": host_id}).one()
    reported = (host.inventory or {}).get("numa_cells", ())
    kept = cpu_sets.parse(host.dedicated_cpus, field="dedicated_cpus")
    own = {cpu for cell in reported if cell["index"] in cells for cpu in cell["cpus"]}
    return page_kib, cells, cpu_sets.text_of(kept & own)


def _cdrom(parts: VmParts) -> CdromSpec | None:
    """Return the vm's drive; it boots after the disks, so that an empty disk is installed and a full one is not installed anew."""
    vm = parts.vm
    if not vm.has_cdrom:
        return None
    order = 1 + max((volume.boot_order for volume in parts.volumes), default=0)
    home = state_volume(parts.volumes)
    pool_id = home.pool_id if home is not None and vm.cdrom_image_id else ""
    return CdromSpec(image_id=vm.cdrom_image_id if pool_id else "", pool_id=pool_id, boot_order=order)


def _drivers(parts: VmParts) -> CdromSpec | None:
    """Return the drive with drivers; nothing boots from it."""
    home = state_volume(parts.volumes)
    if not parts.vm.drivers_image_id or home is None:
        return None
    return CdromSpec(image_id=parts.vm.drivers_image_id, pool_id=home.pool_id)


def state_volume(volumes: Sequence[Volume]) -> Volume | None:
    """Return the volume in whose pool a vm's other files are, its ISO image among them: the one that it boots from."""
    bootable = [volume for volume in volumes if volume.boot_order]
    return min(bootable or volumes, key=lambda volume: (volume.boot_order, volume.disk_index or 0), default=None)


BLOCK_KINDS = (PoolKind.ISCSI, PoolKind.LVM_THIN, PoolKind.RBD)
"""Kinds of pools that hold volumes and no files: no images, no seeds, no UEFI variables."""


def _disk(volume: Volume) -> DiskSpec:
    return DiskSpec(
        volume_id=volume.id,
        pool_id=volume.pool_id,
        format=volume.format,
        index=volume.disk_index or 0,
        bus=volume.bus,
        boot_order=volume.boot_order,
        is_read_only=volume.is_read_only,
        layer_id=volume.layer_id,
        is_merging=volume.merge_layer_id is not None,
        merge_layer_id=volume.merge_layer_id or "",
        move_pool_id=volume.other_pool_id or "" if volume.move_state == "going" else "",
        move_format=DiskFormat(volume.other_format) if volume.move_state == "going" else None,
        iops_limit=volume.iops_limit,
        bandwidth_limit_bytes_s=volume.bandwidth_limit_mib_s << 20,
        is_encrypted=volume.is_encrypted,
        unit=volume.unit,
    )


def _nic(nic: Nic) -> NicSpec:
    return NicSpec(
        nic_id=nic.id,
        network_id=nic.network_id,
        mac=nic.mac,
        index=nic.nic_index,
        model=nic.model,
        addresses=nic.addresses,
        allows_spoofing=nic.allows_spoofing,
    )


def _seed(documents: Mapping[str, Any]) -> SeedSpec | None:
    if not documents:
        return None
    return SeedSpec(
        meta_yaml=documents.get("meta_yaml", ""),
        user_yaml=documents.get("user_yaml", ""),
        network_yaml=documents.get("network_yaml", ""),
    )


def _by_id(session: Session, table: sa.Table, target: type[T], ids: Collection[str]) -> dict[str, T]:
    if not ids:
        return {}
    if len(ids) == 1:  # nearly always; a list of parameters is put into the statement's text anew at each execution
        rows = session.execute(_select_one(table, cast(Any, target)), {"id": next(iter(ids))})
    else:
        rows = session.execute(_select_by_id(table, cast(Any, target)), {"ids": list(ids)})
    return {row.id: build(target, row) for row in rows}


@cache
def _select_one(table: sa.Table, target: Any) -> sa.Select[Any]:
    return sa.select(*columns_of(table, target)).where(table.c.id == sa.bindparam("id"))


@cache
def _select_by_id(table: sa.Table, target: Any) -> sa.Select[Any]:
    return sa.select(*columns_of(table, target)).where(table.c.id.in_(sa.bindparam("ids", expanding=True)))


def _one(session: Session, table: sa.Table, target: type[T], identifier: str) -> T:
    found = _by_id(session, table, target, {identifier})
    if identifier not in found:
        raise NotFound(f"{table.name.replace('_', '-')}-not-found", f"no {table.name} {identifier}")
    return found[identifier]
