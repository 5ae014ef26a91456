"""Reads an OVF descriptor: the hardware of one machine. Pure."""

import re
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.imports.plan import CARDS_MAX, DISK_MAX_BYTES, DISKS_MAX, ImportedCard
from trimtab_controller.cli.imports.xml_safe import parse

_CPU, _MEMORY, _ETHERNET, _CDROM, _DISK = "3", "4", "10", {"15", "16"}, "17"
_CONTROLLERS = {"5": "IDE controller", "6": "SCSI controller", "20": "SATA controller"}
_UNITS = re.compile(r"byte(?:\s*\*\s*(\d{1,6})(?:\^(\d{1,2}))?)?")
_WORDS = {"kilobytes": 1 << 10, "megabytes": 1 << 20, "gigabytes": 1 << 30, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


@dataclass(frozen=True, slots=True)
class OvfDisk:
    id: str
    file_name: str
    """A member of the archive."""
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class Descriptor:
    name: str
    vcpus: int
    memory_mib: int
    firmware: str
    guest_os: str
    disks: tuple[OvfDisk, ...]
    cards: tuple[ImportedCard, ...]
    unexpressed: tuple[str, ...]


def read(content: bytes) -> Descriptor:
    """Return the machine. CommandFailed where it is none, is several, or its sizes are beyond reason."""
    root = parse(content, "the OVF descriptor")
    systems = [element for element in root.iter() if _tag(element) == "VirtualSystem"]
    if len(systems) != 1:
        raise usage(f"FILE: the OVF describes {len(systems)} machines; one can be imported at a time", code="import-refused")
    system, files, capacities = systems[0], _files(root), _capacities(root)
    unexpressed: list[str] = []
    vcpus = memory_mib = 0
    disks: list[OvfDisk] = []
    cards: list[ImportedCard] = []
    for item in _items(system):
        kind, amount = item.get("ResourceType", ""), _whole(item.get("VirtualQuantity", "0"))
        if kind == _CPU:
            vcpus = amount
        elif kind == _MEMORY:
            memory_mib = amount * _unit(item.get("AllocationUnits", "byte * 2^20")) >> 20
        elif kind == _DISK:
            disks.append(_disk(item, files, capacities))
        elif kind == _ETHERNET:
            cards.append(
                ImportedCard(
                    source=item.get("Connection", ""), mac=item.get("Address", "").lower(), model=item.get("ResourceSubType", "")
                )
            )
        elif kind in _CDROM:
            unexpressed.append("a CD-ROM drive; `trimtab vm cdrom` puts an imported ISO in")
        elif kind not in _CONTROLLERS:
            unexpressed.append(f"device {item.get('ElementName', '') or 'of type ' + kind}"[:120])
    unexpressed += [
        f"section {_tag(each)}" for each in system if _tag(each) in {"ProductSection", "EulaSection", "StartupSection"}
    ]
    if len(disks) > DISKS_MAX or len(cards) > CARDS_MAX:
        raise usage(f"FILE: {len(disks)} disks and {len(cards)} cards; {DISKS_MAX} of each at most", code="import-refused")
    name = next((each.text or "" for each in system if _tag(each) == "Name"), "") or _attribute(system, "id")
    return Descriptor(
        name.strip(), vcpus, memory_mib, _firmware(system), _guest_os(system), tuple(disks), tuple(cards), tuple(unexpressed)
    )


def _items(system: Element) -> list[dict[str, str]]:
    items = (element for element in system.iter() if _tag(element) in {"Item", "StorageItem", "EthernetPortItem"})
    return [{_tag(child): (child.text or "").strip() for child in item} for item in items]


def _files(root: Element) -> dict[str, str]:
    found = {}
    for element in root.iter():
        if _tag(element) == "File":
            if _attribute(element, "compression"):
                raise usage("FILE: a disk in the OVA is compressed as a whole, which is not supported", code="import-refused")
            found[_attribute(element, "id")] = _attribute(element, "href")
    return found


def _capacities(root: Element) -> dict[str, tuple[str, int]]:
    """Return file reference and capacity by disk id."""
    found = {}
    for element in root.iter():
        if _tag(element) == "Disk":
            unit = _unit(_attribute(element, "capacityAllocationUnits") or "byte")
            capacity = _whole(_attribute(element, "capacity")) * unit
            if capacity > DISK_MAX_BYTES:
                raise usage(f"FILE: a disk of more than {DISK_MAX_BYTES >> 40} TiB", code="import-refused")
            if _attribute(element, "parentRef"):
                raise usage("FILE: a disk lies over another; export the machine without snapshots", code="import-refused")
            found[_attribute(element, "diskId")] = (_attribute(element, "fileRef"), capacity)
    return found


def _disk(item: dict[str, str], files: dict[str, str], capacities: dict[str, tuple[str, int]]) -> OvfDisk:
    resource = item.get("HostResource", "")
    disk_id = resource.rpartition("/")[2]
    reference, capacity = capacities.get(disk_id, ("", 0))
    name = files.get(reference, "")
    if not name:
        raise usage(f"FILE: disk {resource[:80] or '(none)'} has no file in the archive", code="import-refused")
    return OvfDisk(disk_id, name, capacity)


def _firmware(system: Element) -> str:
    for element in system.iter():
        if _tag(element) == "Config" and _attribute(element, "key") == "firmware":
            return "uefi" if _attribute(element, "value") == "efi" else "bios"
    return ""


def _guest_os(system: Element) -> str:
    for element in system:
        if _tag(element) == "OperatingSystemSection":
            said = " ".join([*(text for text in element.itertext()), *element.attrib.values()]).lower()
            if "windows" in said:
                return "windows"
            return "linux" if any(word in said for word in ("linux", "debian", "ubuntu", "centos", "rhel", "suse")) else "generic"
    return ""


def _unit(text: str) -> int:
    lowered = text.strip().lower()
    if lowered in _WORDS:
        return _WORDS[lowered]
    matched = _UNITS.fullmatch(lowered)
    if matched is None or int(matched[2] or 0) > 60:
        raise usage(f"FILE: the OVF counts in {text[:40]!r}, which is no unit", code="import-refused")
    return int(int(matched[1] or 1) ** int(matched[2] or 1))


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise usage(f"FILE: the OVF says {text[:40]!r} where a number is due", code="import-refused")
    return int(text)


def _tag(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _attribute(element: Element, name: str) -> str:
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")
