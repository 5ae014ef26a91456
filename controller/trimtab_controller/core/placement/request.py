"""What is to be placed: one vm's needs, free of database rows and of the saga that asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from trimtab_protos.messages import Firmware


class PlacementKind(StrEnum):
    CREATE = "create"
    # Its disks exist and hold their space; it needs compute.
    START = "start"
    # It runs: its disks on local pools are copied to the target, those on shared pools stay.
    MIGRATE = "migrate"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    name: str
    pool_id: str
    size_bytes: int
    host_id: str = ""
    """Where its bytes are, on a local pool; '' on a shared pool or while it is not made."""
    is_claimed: bool = False
    """Its space is claimed already at the place where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkNeed:
    network_id: str
    name: str
    mtu: int = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """Everything that the decision depends on besides the fleet. '' stands for "any" throughout."""

    request_id: str
    """The operation that waits for the answer."""
    vm_id: str
    vm_name: str
    project_id: str
    kind: PlacementKind
    vcpus: int
    memory_mib: int
    disks: tuple[DiskNeed, ...] = ()
    networks: tuple[NetworkNeed, ...] = ()
    arch: str = ""
    cpu_model: str = ""
    """'' until the first placement fixes it; then the host must be able to run its class's model."""
    cpu_features: tuple[str, ...] = ()
    machine: str = ""
    firmware: Firmware = Firmware.BIOS
    accelerator: str = ""
    """The source's, for a live migration: a guest does not move between kvm and tcg."""
    host_selector: Mapping[str, str] = field(default_factory=dict)
    host_class: str = ""
    required_host_id: str = ""
    """The operator's choice (`--to`); it obeys every other rule too."""
    excluded_host_ids: tuple[str, ...] = ()
    """The source of a migration."""
    preferred_host_id: str = ""
    """Where a stopped vm is defined."""
    capabilities: tuple[str, ...] = ()
    """What the host's agent must be able to do for the vm: `tpm`."""
    image_ids: tuple[str, ...] = ()
    """Base images of disks that will be made on a local pool: a host that has them saves a copy."""
    priority: int = 0
    order: int = 0
    """Earlier first within a project and priority: for example the microsecond of creation."""

    def __post_init__(self) -> None:
        negative = [disk.name for disk in self.disks if disk.size_bytes < 0]
        if self.vcpus < 0 or self.memory_mib < 0 or negative:
            raise ValueError(f"request {self.request_id} asks for less than nothing")

    def as_json(self) -> dict[str, Any]:
        """Return the request as stored beside its decision, so that it can be asked again."""
        return {
            "request_id": self.request_id,
            "vm_id": self.vm_id,
            "vm_name": self.vm_name,
            "project_id": self.project_id,
            "kind": self.kind.value,
            "vcpus": self.vcpus,
            "memory_mib": self.memory_mib,
            "disks": [
                {
                    "name": disk.name,
                    "pool_id": disk.pool_id,
                    "size_bytes": disk.size_bytes,
                    "host_id": disk.host_id,
                    "is_claimed": disk.is_claimed,
                }
                for disk in self.disks
            ],
            "networks": [{"network_id": one.network_id, "name": one.name, "mtu": one.mtu} for one in self.networks],
            "arch": self.arch,
            "cpu_model": self.cpu_model,
            "cpu_features": list(self.cpu_features),
            "machine": self.machine,
            "firmware": self.firmware.value,
            "accelerator": self.accelerator,
            "host_selector": dict(self.host_selector),
            "host_class": self.host_class,
            "required_host_id": self.required_host_id,
            "excluded_host_ids": list(self.excluded_host_ids),
            "preferred_host_id": self.preferred_host_id,
            "capabilities": list(self.capabilities),
            "image_ids": list(self.image_ids),
            "priority": self.priority,
            "order": self.order,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "PlacementRequest":
        """Return the request of a stored document. Fields that a later release wrote are ignored, missing ones take defaults."""
        known = {name: document[name] for name in cls.__slots__ if name in document}
        return cls(
            **{
                **known,
                "kind": PlacementKind(document["kind"]),
                "disks": tuple(DiskNeed(**disk) for disk in document.get("disks", ())),
                "networks": tuple(NetworkNeed(**network) for network in document.get("networks", ())),
                "firmware": Firmware(document.get("firmware", Firmware.BIOS)),
                "cpu_features": tuple(document.get("cpu_features", ())),
                "excluded_host_ids": tuple(document.get("excluded_host_ids", ())),
                "capabilities": tuple(document.get("capabilities", ())),
                "image_ids": tuple(document.get("image_ids", ())),
            }
        )
