"""The messages of `agent.v1` as frozen dataclasses, so that neither the agent's hypervisors nor the controller's sagas touch protobuf.
Each class mirrors the message of the same name field by field (`codec.py`; a test compares every field with the descriptors). The
fields' documentation stands in the `.proto` files. Enums: value = proto name without its prefix."""

from dataclasses import dataclass, field
from enum import StrEnum

from trimtab_protos.device_messages import CdromSpec, GuestResources
from trimtab_protos.image_messages import HostFileSource as HostFileSource  # noqa: PLC0414 - they are messages of this file too
from trimtab_protos.image_messages import PeerSource as PeerSource  # noqa: PLC0414 - they are messages of this file too
from trimtab_protos.image_messages import UploadSource as UploadSource  # noqa: PLC0414 - they are messages of this file too
from trimtab_protos.image_messages import UrlSource as UrlSource  # noqa: PLC0414 - they are messages of this file too
from trimtab_protos.image_messages import VolumeSource as VolumeSource  # noqa: PLC0414 - they are messages of this file too
from trimtab_protos.network_messages import Bridge, FirewallSpec
from trimtab_protos.pool_messages import IscsiSource, LvmSource, NfsSource, RbdSource


class Direction(StrEnum):
    DO = "do"
    UNDO = "undo"


class JobState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PoolKind(StrEnum):
    DIR = "dir"
    NFS = "nfs"
    ISCSI = "iscsi"
    LVM_THIN = "lvm_thin"
    RBD = "rbd"


class DiskFormat(StrEnum):
    RAW = "raw"
    QCOW2 = "qcow2"
    ISO = "iso"


class Firmware(StrEnum):
    BIOS = "bios"
    UEFI = "uefi"


class DiskBus(StrEnum):
    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"


class NetworkKind(StrEnum):
    BRIDGE = "bridge"
    NAT = "nat"
    ISOLATED = "isolated"
    OVERLAY = "overlay"
    WIRE = "wire"


class DomainState(StrEnum):
    ABSENT = "absent"
    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    CRASHED = "crashed"
    INCOMING = "incoming"


class StateReason(StrEnum):
    NONE = "none"
    GUEST_SHUTDOWN = "guest_shutdown"
    DESTROYED = "destroyed"
    CRASHED = "crashed"
    FAILED = "failed"
    MIGRATED = "migrated"
    USER_PAUSED = "user_paused"
    IO_ERROR = "io_error"
    POSTCOPY_FAILED = "postcopy_failed"
    HOST_BOOTED = "host_booted"


class PowerAction(StrEnum):
    START = "start"
    SHUT_DOWN = "shut_down"
    FORCE_OFF = "force_off"
    REBOOT = "reboot"
    RESET = "reset"
    PAUSE = "pause"
    RESUME = "resume"


class ChangedPart(StrEnum):
    VCPUS = "vcpus"
    MEMORY = "memory"
    DISK = "disk"
    NIC = "nic"
    CDROM = "cdrom"


class MigrationSide(StrEnum):
    KEEP = "keep"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandKey:
    operation_id: str
    step: str
    subject_id: str
    turn: int
    direction: Direction = Direction.DO
    epoch: int = 0
    incarnation: str = ""
    lease_number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    pool_id: str
    path: str
    name: str = ""
    kind: PoolKind = PoolKind.DIR
    is_shared: bool = False
    nfs: NfsSource | None = None
    iscsi: IscsiSource | None = None
    lvm: LvmSource | None = None
    rbd: RbdSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolObservation:
    pool_id: str
    capacity_bytes: int = 0
    available_bytes: int = 0
    promised_bytes: int = 0
    is_responsive: bool = True
    problem: str = ""
    observed_at_ms: int = 0
    is_hung: bool = False
    written_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSpec:
    volume_id: str
    pool_id: str
    format: DiskFormat
    size_bytes: int
    base_image_id: str = ""
    base_image_format: DiskFormat | None = None
    copy_image_id: str = ""
    generation: int = 1
    layer_id: str = ""
    base_volume_id: str = ""
    base_layer_id: str = ""
    copy_volume_id: str = ""
    copy_layer_id: str = ""
    is_encrypted: bool = False
    unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeObservation:
    volume_id: str
    is_present: bool
    size_bytes: int = 0
    allocated_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    image_id: str
    pool_id: str
    format: DiskFormat
    source_sha256: str = ""
    max_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    image_id: str
    format: DiskFormat
    virtual_size_bytes: int
    file_size_bytes: int
    source_sha256: str
    stored_sha256: str


ImageSource = UploadSource | UrlSource | HostFileSource | PeerSource | VolumeSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRef:
    volume_id: str
    layer_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMerge:
    volume_id: str
    pool_id: str
    top_layer_id: str
    base_layer_id: str = ""
    children: tuple[LayerRef, ...] = ()
    vm_id: str = ""
    keeps_running: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    consistency: str = ""
    note: str = ""
    size_bytes: int = 0
    paused_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    volume_id: str
    pool_id: str
    format: DiskFormat
    index: int
    bus: DiskBus = DiskBus.VIRTIO
    boot_order: int = 0
    is_read_only: bool = False
    iops_limit: int = 0
    bandwidth_limit_bytes_s: int = 0
    layer_id: str = ""
    is_merging: bool = False
    merge_layer_id: str = ""
    move_pool_id: str = ""
    move_format: DiskFormat | None = None
    is_encrypted: bool = False
    unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NicSpec:
    nic_id: str
    network_id: str
    mac: str
    index: int
    model: str = "virtio"
    addresses: tuple[str, ...] = ()
    allows_spoofing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedSpec:
    meta_yaml: str
    user_yaml: str = ""
    network_yaml: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    network_id: str
    kind: NetworkKind
    name: str
    bridge: str = ""
    vlan: int = 0
    mtu: int = 1500
    subnet: str = ""
    has_dhcp: bool = False
    is_outer: bool = False
    keeps_groups: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSpec:
    vm_id: str
    uuid: str
    name: str
    project: str
    machine: str
    cpu_model: str
    vcpus: int
    vcpus_max: int
    memory_mib: int
    memory_max_mib: int
    arch: str = "x86_64"
    cpu_features: tuple[str, ...] = ()
    firmware: Firmware = Firmware.BIOS
    has_secure_boot: bool = False
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    seed: SeedSpec | None = None
    serial_log_max_bytes: int = 1 << 20
    spare_pcie_ports: int = 8
    networks: tuple[NetworkSpec, ...] = ()
    pools: tuple[PoolSpec, ...] = ()
    cdrom: CdromSpec | None = None
    has_tpm: bool = False
    has_local_time_clock: bool = False
    has_hyperv: bool = False
    is_kept: bool = False
    page_kib: int = 0
    numa_cells: tuple[int, ...] = ()
    cpuset: str = ""
    host_devices: tuple[str, ...] = ()
    firewall: FirewallSpec | None = None
    resources: GuestResources | None = None
    drivers: CdromSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainObservation:
    vm_id: str
    uuid: str = ""
    name: str = ""
    state: DomainState = DomainState.ABSENT
    reason: StateReason = StateReason.NONE
    epoch: int = 0
    turn: int = 0
    vcpus: int = 0
    memory_mib: int = 0
    disk_bytes: int = 0
    macs: tuple[str, ...] = ()
    has_guest_agent: bool = False
    addresses: tuple[str, ...] = ()
    cpu_time_ns: int = 0
    observed_at_ms: int = 0
    is_persistent: bool = False
    is_migrating: bool = False
    starts: int = 0
    rss_mib: int = 0
    restarts_elsewhere: bool = False
    balloon_mib: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeLeft:
    part: ChangedPart
    reason: str
    device_id: str = ""
    needs_stop: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaCell:
    index: int
    memory_mib: int
    cpus: tuple[int, ...] = ()
    huge_pages: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PciDevice:
    address: str
    vendor_id: str
    product_id: str
    class_id: str
    driver: str = ""
    iommu_group: int = -1
    numa_cell: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    purpose: str
    serial: str
    not_after_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestQemu:
    vm_id: str
    build: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    hostname: str
    arch: str
    machine_id: str
    smbios_uuid: str
    boot_id: str
    kernel: str
    agent_version: str
    libvirt_version: str
    qemu_version: str
    accelerator: str
    cpu_vendor: str
    cpu_model: str
    cpus: int
    memory_mib: int
    cpu_features: tuple[str, ...] = ()
    usable_cpu_models: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    numa_cells: tuple[NumaCell, ...] = ()
    pci_devices: tuple[PciDevice, ...] = ()
    bridges: tuple[Bridge, ...] = ()
    pools: tuple[PoolObservation, ...] = ()
    certificates: tuple[Certificate, ...] = ()
    capabilities: tuple[str, ...] = ()
    unmanaged_vcpus: int = 0
    unmanaged_memory_mib: int = 0
    unmanaged_disk_bytes: int = 0
    unmanaged_macs: tuple[str, ...] = ()
    has_uefi: bool = False
    digest: str = ""
    migration_address: str = ""
    overlay_chassis: str = ""
    qemu_build: str = ""
    guest_qemus: tuple[GuestQemu, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationOptions:
    bandwidth_mib_s: int = 0
    has_auto_converge: bool = False
    allow_postcopy: bool = False
    max_downtime_ms: int = 0
    timeout_s: int = 0
    is_flattened: bool = False
    """Copied disks are written whole, whatever they lie over on the source; else their top layer, onto the same base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationResult:
    total_ms: int
    downtime_ms: int
    transferred_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_s: int = 0
    phase: str = ""
    remaining_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    cpu_used_permille: int = 0
    cpu_steal_permille: int = 0
    memory_available_mib: int = 0
    cpu_pressure: int = 0
    memory_pressure: int = 0
    io_pressure: int = 0
    running_domains: int = 0
    has_uplink_carrier: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupDisk:
    name: str
    volume_id: str
    generation: int
    size_bytes: int
    dirty_bytes: int
    read_bytes: int
    stored_bytes: int
    full_reason: str
    root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupSummary:
    backup_id: str
    vm_id: str
    vm_name: str
    project_id: str
    created_ms: int
    consistency: str
    base_id: str
    notes: dict[str, str]
    disks: tuple[BackupDisk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    written_bytes: int
    root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedBackup:
    backup_id: str
    vm_id: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    read_bytes: int
    damaged_records: int
    damaged: tuple[DamagedBackup, ...]
    unreadable_manifests: tuple[str, ...]
    others: tuple[DamagedBackup, ...] = ()
    are_others_judged: bool = False
