"""What an import makes of a machine, before anything is done."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DISK_MAX_BYTES = 16 << 40
DISKS_MAX, CARDS_MAX = 16, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedDisk:
    """One disk. `unpack` writes it into a folder and returns the file and its format, `qcow2` or `raw`."""

    label: str
    """What it is called where it comes from: `scsi0`, `vmdisk1`, a file's name."""
    size_bytes: int
    """0: told by the file itself when it is imported."""
    unpack: Callable[[Path, Callable[[int, int], None]], tuple[Path, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedCard:
    source: str
    """The network, bridge or libvirt network that it is on where it comes from."""
    mac: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    name: str
    """What it is called where it comes from."""
    vcpus: int = 0
    """0: it does not say."""
    memory_mib: int = 0
    firmware: str = ""
    """bios or uefi; '' where it does not say."""
    guest_os: str = ""
    """linux, windows or generic; '' where it does not say."""
    disks: tuple[ImportedDisk, ...] = ()
    """The first is booted from."""
    cards: tuple[ImportedCard, ...] = ()
    unexpressed: tuple[str, ...] = field(default=())
    """What no field of a vm says; it is gone after the import."""
