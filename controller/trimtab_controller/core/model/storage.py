"""Pools, images, volumes and networks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from trimtab_protos.messages import DiskBus, DiskFormat, PoolKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    id: str
    name: str
    kind: PoolKind
    path: str
    is_shared: bool
    sharing_proven_at: datetime | None
    reserve_permille: int
    version: int
    created_at: datetime
    # Of a pool that is mounted: from where and how (`describe.nfs_source`).
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpace:
    """Space at one place: the whole shared pool (host_id '') or a local pool on one host."""

    pool_id: str
    host_id: str
    capacity_bytes: int
    available_bytes: int
    claimed_bytes: int
    written_bytes: int | None
    observed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    id: str
    project_id: str
    name: str
    kind: str
    format: DiskFormat
    virtual_size_bytes: int
    file_size_bytes: int
    source_sha256: str
    stored_sha256: str
    state: str
    labels: Mapping[str, str]
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReplica:
    image_id: str
    pool_id: str
    host_id: str
    state: str
    owner_operation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    id: str
    project_id: str
    name: str
    pool_id: str
    host_id: str
    format: DiskFormat
    size_bytes: int
    base_image_id: str | None
    generation: int
    observed_state: str
    allocated_bytes: int
    vm_id: str | None
    disk_index: int | None
    bus: DiskBus
    boot_order: int
    is_read_only: bool
    is_deleted_with_vm: bool
    version: int
    created_at: datetime
    deleted_at: datetime | None
    iops_limit: int = 0
    bandwidth_limit_mib_s: int = 0
    # The layer that its vm writes to; '' is the bottom one.
    layer_id: str = ""
    # While that one is being merged: the layer it goes into, which is written to once the other's file is gone.
    merge_layer_id: str | None = None
    # What the bottom layer of a linked clone lies over.
    parent_volume_id: str | None = None
    parent_layer_id: str = ""
    # While it still reads from a backup: which, and which disk of it.
    fill_backup_id: str = ""
    fill_disk: str = ""
    is_encrypted: bool = False
    # Of a pool whose volumes have numbers: its LUN.
    unit: str = ""
    purge_after: datetime | None = None
    # Of one that moves between pools: its other place, and whether it is `going` there or has `left` it.
    other_pool_id: str | None = None
    other_host_id: str = ""
    other_format: str = ""
    move_state: str = ""


class VolumeSummary(NamedTuple):
    """What a vm shows of each of its disks: fields of `Volume`. A plain tuple, as `VmSummary` is."""

    id: str
    name: str
    pool_id: str
    size_bytes: int
    vm_id: str
    disk_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    id: str
    project_id: str
    name: str
    kind: str
    bridge: str
    vlan: int
    mtu: int
    subnet: str
    has_dhcp: bool
    version: int
    created_at: datetime
    # Of an overlay network: {router, subnet6, has_dhcp6}, of its way out: {outer}, of another on a bridge: {gateway, dns}; only what
    # it has.
    settings: Mapping[str, Any]

    @property
    def subnet6(self) -> str:
        """Its IPv6 subnet beside `subnet`; '' for none."""
        return str(self.settings.get("subnet6", ""))

    @property
    def gateway(self) -> str:
        """The router of its LAN, as the operator said it; '' for none."""
        return str(self.settings.get("gateway", ""))

    @property
    def dns(self) -> tuple[str, ...]:
        """The DNS servers of its LAN, as the operator said them."""
        return tuple(self.settings.get("dns", ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    id: str
    vm_id: str
    name: str
    parent_id: str | None
    # making, ready, deleting; one that is not ready while nothing works on it was cut short, and is deleted.
    state: str
    has_memory: bool
    # crash, filesystem, memory, stopped; '' while it is made.
    consistency: str
    note: str
    # Kept only until what is made from it is there.
    is_temporary: bool
    vcpus: int
    memory_mib: int
    memory_bytes: int
    # [{volume_id, layer_id, size_bytes}]
    volumes: tuple[Mapping[str, Any], ...]
    created_at: datetime
    deleted_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    id: str
    project_id: str
    name: str
    revision: int
    image_id: str
    settings: Mapping[str, Any]
    version: int
    created_at: datetime
    deleted_at: datetime | None
