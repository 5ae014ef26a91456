"""What an operating system makes of a vm's hardware. Pure.

A guest without drivers for virtio cannot see its disk, and one that takes the hardware clock for local time is hours off: what it
needs is told by its name, which is a family (`linux`, `windows`, `generic`) or one of osinfo's (`debian12`, `win11`).
"""

from dataclasses import dataclass
from enum import StrEnum

from trimtab_protos.messages import DiskBus, Firmware


class Family(StrEnum):
    LINUX = "linux"
    WINDOWS = "windows"
    # Anything else: hardware that everything since about 2005 has drivers for.
    GENERIC = "generic"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOs:
    """An operating system as installed from its own medium, without drivers added."""

    name: str
    family: Family
    has_virtio_disk: bool
    has_virtio_net: bool
    # Does not boot by BIOS at all.
    needs_uefi: bool = False
    # What a vm of it gets where nobody says how much: what its makers recommend, else the least that it needs, else its family's.
    memory_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    disk_bus: DiskBus
    nic_model: str
    firmware: Firmware


FAMILIES = {
    "linux": GuestOs(name="linux", family=Family.LINUX, has_virtio_disk=True, has_virtio_net=True, memory_mib=2048),
    # The least of Windows 11.
    "windows": GuestOs(name="windows", family=Family.WINDOWS, has_virtio_disk=False, has_virtio_net=False, memory_mib=4096),
    "generic": GuestOs(name="generic", family=Family.GENERIC, has_virtio_disk=False, has_virtio_net=False, memory_mib=1024),
}


def hardware_for(guest_os: GuestOs) -> Hardware:
    """Return the hardware that the system finds its way about in."""
    return Hardware(
        disk_bus=DiskBus.VIRTIO if guest_os.has_virtio_disk else DiskBus.SATA,
        nic_model="virtio" if guest_os.has_virtio_net else "e1000e",
        firmware=Firmware.UEFI if guest_os.needs_uefi else Firmware.BIOS,
    )


def takes_local_time(family: str) -> bool:
    """Tell whether the system takes the hardware clock for local time."""
    return family == Family.WINDOWS


def has_enlightenments(family: str) -> bool:
    """Tell whether the system knows Hyper-V's interface to its host."""
    return family == Family.WINDOWS
