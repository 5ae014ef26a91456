"""What is to be placed: one vm's needs, free of database rows and of the saga that asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from trimtab_controller.core.placement.lifetimes import Kind
from trimtab_controller.core.placement.needs import DiskNeed, GroupNeed, NetworkNeed, Toleration
from trimtab_protos.messages import Firmware

__all__ = ["DiskNeed", "GroupNeed", "NetworkNeed", "PlacementKind", "PlacementRequest", "Toleration"]


class PlacementKind(StrEnum):
    CREATE = "create"
    # Its disks exist and hold their space; it needs compute.
    START = "start"
    # It runs: its disks on local pools are copied to the target, those on shared pools stay.
    MIGRATE = "migrate"


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
    qemu_series: tuple[int, ...] = ()
    """Major and minor of the QEMU that runs it, for a live migration: an older one may not take its state."""
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
    is_dedicated: bool = False
    """Each vcpu gets a cpu of its own, of those set aside for pinning; then `vcpus` counts cpus."""
    page_kib: int = 0
    """Size of the huge pages that back all of its memory, in KiB; 0 for ordinary memory."""
    cell_count: int = 1
    """NUMA cells over which pinned cpus and huge pages spread, in equal shares; both must divide by it."""
    held_cells: tuple[int, ...] = ()
    """Of a vm that runs: the cells it holds, so that they can be given back."""
    devices: Mapping[str, int] = field(default_factory=dict)
    """PCI devices by kind."""
    resources: Mapping[str, int] = field(default_factory=dict)
    """What operators count, by name."""
    tolerations: tuple[Toleration, ...] = ()
    group: GroupNeed | None = None
    restarts_elsewhere: bool = False
    """It shall run on another host when its own is lost."""
    family: str = ""
    """Vms of one family are expected to live alike: what one owner names or asks for together."""
    priority: int = 0
    order: int = 0
    """Earlier first within a project and priority: for example the microsecond of creation."""

    def __post_init__(self) -> None:
        sizes = (*(disk.size_bytes for disk in self.disks), *self.devices.values(), *self.resources.values())
        if self.vcpus < 0 or self.memory_mib < 0 or self.page_kib < 0 or any(size < 0 for size in sizes):
            raise ValueError(f"request {self.request_id} asks for less than nothing")
        if (self.is_dedicated or self.page_kib) and (self.cell_count < 1 or self._is_uneven):
            raise ValueError(f"request {self.request_id} does not divide into {self.cell_count} cells")

    @property
    def life_kind(self) -> Kind:
        return Kind(self.family, self.vcpus, self.memory_mib)

    @property
    def page_count(self) -> int:
        return self.memory_mib * 1024 // self.page_kib if self.page_kib else 0

    @property
    def _is_uneven(self) -> bool:
        is_cut = bool(self.page_kib) and (self.memory_mib * 1024) % (self.page_kib * self.cell_count) != 0
        return is_cut or (self.is_dedicated and self.vcpus % self.cell_count != 0)

    def as_json(self) -> dict[str, Any]:
        """Return the request as stored beside its decision, so that it can be asked again; `family` follows from names."""
        return {
            "request_id": self.request_id,
            "vm_id": self.vm_id,
            "vm_name": self.vm_name,
            "project_id": self.project_id,
            "kind": self.kind.value,
            "vcpus": self.vcpus,
            "memory_mib": self.memory_mib,
            "disks": [disk.as_json() for disk in self.disks],
            "networks": [network.as_json() for network in self.networks],
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
            **self._scarce_as_json(),
        }

    def _scarce_as_json(self) -> dict[str, Any]:
        """Return what few requests ask for, and nothing of what this one does not: a decision is kept for every vm."""
        wishes = {
            "is_dedicated": self.is_dedicated,
            "page_kib": self.page_kib,
            "cell_count": self.cell_count if self.cell_count != 1 else 0,
            "held_cells": list(self.held_cells),
            "devices": dict(self.devices),
            "resources": dict(self.resources),
            "tolerations": [one.as_json() for one in self.tolerations],
            "group": self.group.as_json() if self.group else None,
            "restarts_elsewhere": self.restarts_elsewhere,
            "qemu_series": list(self.qemu_series),
        }
        return {name: wish for name, wish in wishes.items() if wish}

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
                "qemu_series": tuple(document.get("qemu_series", ())),
                "held_cells": tuple(document.get("held_cells", ())),
                "tolerations": tuple(Toleration(**one) for one in document.get("tolerations", ())),
                "group": GroupNeed.from_json(document["group"]) if document.get("group") else None,
            }
        )
