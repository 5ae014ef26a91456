"""The messages of adoption as frozen dataclasses; see `messages.py`, of which this is a part kept apart by noun."""

from dataclasses import dataclass

from trimtab_protos.messages import DomainState, Firmware


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedDisk:
    target: str
    device: str = "disk"
    path: str = ""
    format: str = "raw"
    bus: str = "virtio"
    is_read_only: bool = False
    size_bytes: int = 0
    boot_order: int = 0
    problem: str = ""
    volume_id: str = ""
    cache: str = ""
    iops_limit: int = 0
    bandwidth_limit_bytes_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedNic:
    mac: str
    model: str = "virtio"
    bridge: str = ""
    network: str = ""
    kind: str = "bridge"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDescription:
    uuid: str
    name: str
    vm_id: str = ""
    state: DomainState = DomainState.RUNNING
    is_persistent: bool = True
    has_autostart: bool = False
    arch: str = "x86_64"
    machine: str = ""
    cpu_mode: str = ""
    cpu_model: str = ""
    cpu_features: tuple[str, ...] = ()
    vcpus: int = 1
    vcpus_max: int = 1
    memory_mib: int = 0
    memory_max_mib: int = 0
    firmware: Firmware = Firmware.BIOS
    has_secure_boot: bool = False
    has_tpm: bool = False
    disks: tuple[DescribedDisk, ...] = ()
    nics: tuple[DescribedNic, ...] = ()
    kept: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()
    original_xml: str = ""
    squeezed_to_mib: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedDisk:
    target: str
    path: str
    volume_id: str


@dataclass(frozen=True, slots=True)
class Described:
    """A domain's two definitions; the same one twice where it does not run."""

    live: DomainDescription
    stored: DomainDescription
