"""Reads operating systems from osinfo's database, as Debian's package osinfo-db installs it; nothing of it is copied here.

Without that package only the families are known. Files are read when the first name is asked for, once per process.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from trimtab_controller.core.guest_os import FAMILIES, Family, GuestOs
from trimtab_protos.errors import InvalidRequest

DATABASE = Path("/usr/share/osinfo")
_SHORT_ID = re.compile(r"<short-id>([^<]+)</short-id>")
_OS_ID = re.compile(r'<os id="([^"]+)"')
# PCI ids of virtio's disk and network card, of the first and of the present kind.
_VIRTIO_DISK = frozenset({"http://pcisig.com/pci/1af4/1001", "http://pcisig.com/pci/1af4/1042"})
_VIRTIO_NET = frozenset({"http://pcisig.com/pci/1af4/1000", "http://pcisig.com/pci/1af4/1041"})
_FAMILIES = {"linux": Family.LINUX, "winnt": Family.WINDOWS, "win9x": Family.WINDOWS, "win16": Family.WINDOWS}
_PARENTS_MAX = 50
_MIB = 1 << 20
# The least that a vm may have.
_MEMORY_MIN_MIB = 16


@dataclass(frozen=True, slots=True)
class _Index:
    by_short_id: Mapping[str, Path]
    by_id: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class _Entry:
    family: str
    parents: tuple[str, ...]
    devices: Mapping[str, bool]
    needs_uefi: bool
    # Bytes of memory: recommended, else the least; 0 where it says nothing.
    memory_bytes: int = 0


def find(name: str, database: Path = DATABASE) -> GuestOs:
    """Return a family or one of osinfo's systems. InvalidRequest names some that are known."""
    if name in FAMILIES:
        return FAMILIES[name]
    index = _index(database)
    path = index.by_short_id.get(name)
    if path is None:
        close = [one for one in sorted(index.by_short_id) if one.startswith(name[:3])][:8] if name else []
        known = ", ".join([*FAMILIES, *close])
        source = "" if index.by_short_id else "; for names such as debian12 install the package osinfo-db on the controller"
        raise InvalidRequest("os-unknown", f"os: {name} is not known; for example {known}{source}", field="os")
    return _resolve(name, path, index)


@cache
def _index(database: Path) -> _Index:
    by_short_id, by_id = {}, {}
    for path in sorted(database.glob("os/*/*.xml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        found = _OS_ID.search(text)
        if found is None:
            continue
        by_id[found[1]] = path
        by_short_id.update(dict.fromkeys(_SHORT_ID.findall(text), path))
    return _Index(by_short_id, by_id)


def _resolve(name: str, path: Path, index: _Index) -> GuestOs:
    """Return the system with what it has from those that it derives from: the nearest word about a device counts."""
    family, devices, needs_uefi, memory_bytes = "", dict[str, bool](), False, 0
    for number, entry in enumerate(_lineage(path, index)):
        family = family or entry.family
        devices = {**entry.devices, **devices}
        needs_uefi = needs_uefi or (number == 0 and entry.needs_uefi)
        memory_bytes = memory_bytes or entry.memory_bytes
    supported = {device for device, is_supported in devices.items() if is_supported}
    own_family = _FAMILIES.get(family, Family.GENERIC)
    memory_mib = max(_MEMORY_MIN_MIB, -(-memory_bytes // _MIB)) if memory_bytes else FAMILIES[own_family.value].memory_mib
    return GuestOs(
        name=name,
        family=own_family,
        has_virtio_disk=bool(supported & _VIRTIO_DISK),
        has_virtio_net=bool(supported & _VIRTIO_NET),
        needs_uefi=needs_uefi,
        memory_mib=memory_mib,
    )


def _lineage(path: Path, index: _Index) -> Iterator[_Entry]:
    waiting, seen = [path], set[Path]()
    while waiting and len(seen) < _PARENTS_MAX:
        here = waiting.pop(0)
        if here in seen:
            continue
        seen.add(here)
        entry = _read(here)
        waiting += [index.by_id[parent] for parent in entry.parents if parent in index.by_id]
        yield entry


def _read(path: Path) -> _Entry:
    # The package's own files: nobody but root writes there.
    root = ElementTree.parse(path).getroot().find("os")  # noqa: S314
    if root is None:
        return _Entry("", (), {}, needs_uefi=False)
    firmware = {one.get("type"): one.get("supported") != "false" for one in root.findall("firmware") if _is_ours(one)}
    return _Entry(
        family=root.findtext("family") or "",
        parents=tuple(one.get("id", "") for tag in ("clones", "derives-from") for one in root.findall(tag)),
        devices={one.get("id", ""): one.get("supported") != "false" for one in root.findall("devices/device")},
        needs_uefi=firmware.get("bios") is False,
        memory_bytes=_memory_bytes(root),
    )


def _memory_bytes(system: ElementTree.Element) -> int:
    """Return what the system's entry says about memory, of an entry for x86_64 before one for all."""
    ours = sorted((one for one in system.findall("resources") if _is_ours(one)), key=lambda one: one.get("arch") == "all")
    words = (one.findtext(f"{word}/ram") for word in ("recommended", "minimum") for one in ours)
    return next((int(word) for word in words if word), 0)


def _is_ours(element: ElementTree.Element) -> bool:
    return element.get("arch") in {"x86_64", "all"}
