"""Disks that lie before us as files."""

import shutil
from collections.abc import Callable
from pathlib import Path

from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.imports import vmdk
from trimtab_controller.cli.imports.plan import ImportedDisk

FORMATS = ("qcow2", "raw", "vmdk")
_BY_SUFFIX = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw", ".dd": "raw", ".vmdk": "vmdk"}
_QCOW2_MAGIC, _SIZE_AT = b"QFI\xfb", 24


def disk_of(path: Path, *, label: str, disk_format: str = "") -> ImportedDisk:
    """Return the disk in a file. Its format is what it is said to be, else what its name says; content is never asked."""
    chosen = disk_format or _BY_SUFFIX.get(path.suffix.lower(), "")
    if not chosen:
        raise usage(f"--format: {path.name} does not say what it is; give --format qcow2, raw or vmdk", code="format-unknown")
    try:
        with path.open("rb") as source:
            size_bytes = vmdk.size_of(source, path.name) if chosen == "vmdk" else _size_of(path, chosen)
    except OSError as error:
        raise usage(f"FILE: cannot read {path}: {error.strerror}", code="file-unreadable") from error

    def unpack(directory: Path, on_progress: Callable[[int, int], None]) -> tuple[Path, str]:
        if chosen != "vmdk":
            return path, chosen
        target = directory / "disk.qcow2"
        with path.open("rb") as source, target.open("wb") as made:
            vmdk.convert(source, made, path.name, on_progress)
        return target, "qcow2"

    return ImportedDisk(label=label, size_bytes=size_bytes, unpack=unpack)


def _size_of(path: Path, disk_format: str) -> int:
    if disk_format == "raw":
        return path.stat().st_size
    with path.open("rb") as source:
        head = source.read(_SIZE_AT + 8)
    if head[:4] != _QCOW2_MAGIC:
        raise usage(f"disk {path.name}: it is no qcow2; give --format for what it is", code="disk-refused")
    return int.from_bytes(head[_SIZE_AT:], "big")


def room_for(directory: Path, size_bytes: int) -> bool:
    """Tell whether the folder has room for so much."""
    return shutil.disk_usage(directory).free > size_bytes
