"""Reads a machine's configuration of Proxmox VE (`/etc/pve/qemu-server/100.conf`, or what `qm config 100` prints). Pure.

Its disks are given as files beside it (`--disk scsi0=FILE`). Backups of `vzdump` (.vma) are Proxmox's own format: restore them there, or
export the disks with `qemu-img convert`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.imports.files import disk_of
from trimtab_controller.cli.imports.plan import CARDS_MAX, ImportedCard, ImportPlan

CONFIG_MAX_BYTES = 64 << 10
_LINE = re.compile(r"(?P<key>[a-z][a-z0-9_]{0,31}):\s*(?P<value>.{0,2000})")
_DISK = re.compile(r"(scsi|virtio|sata|ide)[0-9]{1,2}")
_CARD = re.compile(r"net[0-9]{1,2}")
_MAC = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")
_EXPRESSED = frozenset(
    {"name", "memory", "cores", "sockets", "bios", "ostype", "boot", "bootdisk", "scsihw", "agent", "meta", "vmgenid"}
)
_HARMLESS = frozenset({"smbios1", "numa", "onboot", "digest", "description", "tags", "vcpus", "balloon", "cpu", "machine"})


def read(path: Path, files: Mapping[str, Path], *, disk_format: str = "") -> ImportPlan:
    """Return what the configuration describes; `files`: by the disk's key. CommandFailed names the disks that are missing."""
    values = _values(path)
    keys = [key for key, value in values.items() if _DISK.fullmatch(key) and "media=cdrom" not in value]
    keys.sort(key=lambda key: (_boot_place(values, key), key))
    missing = [key for key in keys if key not in files]
    if missing:
        told = ", ".join(f"{key} ({values[key].partition(',')[0]})" for key in missing)
        raise usage(f"--disk: {path.name} has disks whose files were not given: {told}; give --disk {missing[0]}=FILE for each")
    unknown = sorted(set(files) - set(keys))
    if unknown:
        raise usage(f"--disk: {path.name} has no disk {unknown[0]}; it has {', '.join(keys) or 'none'}")
    cards = tuple(_card(values[key]) for key in sorted(values) if _CARD.fullmatch(key))
    if len(cards) > CARDS_MAX:
        raise usage(f"FILE: {len(cards)} cards; {CARDS_MAX} at most", code="import-refused")
    return ImportPlan(
        name=values.get("name", ""),
        vcpus=_whole(values, "cores", 1) * _whole(values, "sockets", 1),
        memory_mib=_whole(values, "memory", 512),
        firmware="uefi" if values.get("bios") == "ovmf" else "bios",
        guest_os=_guest_os(values.get("ostype", "")),
        disks=tuple(disk_of(files[key], label=key, disk_format=disk_format) for key in keys),
        cards=cards,
        unexpressed=tuple(_unexpressed(values)),
    )


def _values(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as source:
            content = source.read(CONFIG_MAX_BYTES + 1)
    except OSError as error:
        raise usage(f"FILE: cannot read {path}: {error.strerror}", code="file-unreadable") from error
    if len(content) > CONFIG_MAX_BYTES:
        raise usage(f"FILE: {path.name} has more than {CONFIG_MAX_BYTES >> 10} KiB", code="import-refused")
    values: dict[str, str] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        text = line.strip()
        if text.startswith("["):
            break  # snapshots: other states of the same machine
        if not text or text.startswith("#"):
            continue
        matched = _LINE.fullmatch(text)
        if matched is None:
            raise usage(
                f"FILE: line {number} of {path.name} is none of a Proxmox configuration: {text[:60]!r}", code="import-refused"
            )
        values[matched["key"]] = matched["value"].strip()
    return values


def _boot_place(values: Mapping[str, str], key: str) -> int:
    order = values.get("boot", "").partition("order=")[2].partition(",")[0].split(";")
    if key in order:
        return order.index(key)
    return 0 if values.get("bootdisk") == key else len(order)


def _card(value: str) -> ImportedCard:
    parts = dict(part.partition("=")[::2] for part in value.split(","))
    model = next((name for name, mac in parts.items() if _MAC.fullmatch(mac)), "")
    tag = f".{parts['tag']}" if parts.get("tag") else ""
    return ImportedCard(source=parts.get("bridge", "") + tag, mac=parts.get(model, "").lower(), model=model)


def _guest_os(ostype: str) -> str:
    return "windows" if ostype.startswith("w") else "linux" if ostype in {"l24", "l26"} else "generic"


def _unexpressed(values: Mapping[str, str]) -> list[str]:
    found = []
    for key, value in sorted(values.items()):
        if key in _EXPRESSED or key in _HARMLESS or _CARD.fullmatch(key):
            continue
        if not _DISK.fullmatch(key):
            found.append(f"{key}: {value[:80]}")
        elif "media=cdrom" in value:
            found.append(f"{key}: a CD-ROM drive; `trimtab vm cdrom` puts an imported ISO in")
    return found


def _whole(values: Mapping[str, str], key: str, otherwise: int) -> int:
    text = values.get(key, str(otherwise))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise usage(f"FILE: {key} is {text[:40]!r}, which is no number", code="import-refused")
    return int(text)
