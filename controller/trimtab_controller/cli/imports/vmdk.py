"""Reads VMware's sparse disks, `streamOptimized` (what OVA files carry) and `monolithicSparse`, into qcow2.

Decoded here and not by QEMU: its driver follows a descriptor to other files and to parents, which is how a hostile disk reads the host
that imports it. Here a disk is one file, or it is refused.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.imports.plan import DISK_MAX_BYTES
from trimtab_controller.cli.imports.qcow2 import Qcow2Writer

SECTOR = 512
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_MAGIC = b"KDMV"
_COMPRESSED = 1 << 16
_AT_END = (1 << 64) - 1
_TABLE_ENTRIES = 512
_DESCRIPTOR_MAX_SECTORS = 128
_GRAIN_SECTORS = frozenset({8, 16, 32, 64, 128, 256, 512, 1024, 2048})
_TYPES = frozenset({"streamoptimized", "monolithicsparse"})
_ORPHAN = "ffffffff"


@dataclass(frozen=True, slots=True)
class _Layout:
    size_bytes: int
    grain_bytes: int
    directory_at: int
    is_compressed: bool


def size_of(source: BinaryIO, name: str) -> int:
    """Return the disk's size in bytes. CommandFailed where it is no disk of one file."""
    return _layout(source, name).size_bytes


def convert(source: BinaryIO, target: BinaryIO, name: str, on_progress: Callable[[int, int], None]) -> None:
    """Write the disk as qcow2. CommandFailed where its content contradicts itself."""
    layout = _layout(source, name)
    writer = Qcow2Writer(target, layout.size_bytes)
    for offset, content in _grains(source, layout, name):
        writer.write(offset, content[: layout.size_bytes - offset])
        on_progress(offset, layout.size_bytes)
    writer.finish()
    on_progress(layout.size_bytes, layout.size_bytes)


def _layout(source: BinaryIO, name: str) -> _Layout:
    end = source.seek(0, 2)
    fields = _header(source, 0, name)
    sectors, grain, descriptor_at, descriptor_length = fields[3], fields[4], fields[5], fields[6]
    if not 0 < sectors * SECTOR <= DISK_MAX_BYTES:
        raise _refused(name, f"it says that it has {sectors} sectors; up to {DISK_MAX_BYTES >> 40} TiB can be imported")
    if grain not in _GRAIN_SECTORS or fields[7] != _TABLE_ENTRIES:
        raise _refused(
            name, f"its grains have {grain} sectors and its tables {fields[7]} entries, as no VMDK of ours to read has"
        )
    _check_descriptor(source, descriptor_at, descriptor_length, end, name)
    directory_at = fields[9]
    if directory_at == _AT_END:
        # Written as a stream: the header that knows where things are stands at the end, before the end-of-stream marker.
        directory_at = _header(source, end - 2 * SECTOR, name)[9]
    if not 0 < directory_at * SECTOR < end:
        raise _refused(name, "its directory lies outside the file; it was cut short")
    return _Layout(sectors * SECTOR, grain * SECTOR, directory_at * SECTOR, bool(fields[2] & _COMPRESSED))


def _header(source: BinaryIO, at: int, name: str) -> tuple[int, ...]:
    source.seek(max(0, at))
    content = source.read(_HEADER.size)
    if len(content) < _HEADER.size or content[:4] != _MAGIC:
        raise _refused(name, "it is no sparse VMDK of one file, or was cut short")
    fields = _HEADER.unpack(content)
    if fields[1] not in (1, 2, 3):
        raise _refused(name, f"it is of VMDK version {fields[1]}")
    return tuple(field if isinstance(field, int) else 0 for field in fields)


def _check_descriptor(source: BinaryIO, at: int, length: int, end: int, name: str) -> None:
    """Refuse a disk that says it is part of others: a delta over a parent, or extents in other files."""
    if not at:
        return
    if length > _DESCRIPTOR_MAX_SECTORS:
        raise _refused(name, f"its descriptor has {length} sectors")
    if at * SECTOR >= end:
        raise _refused(name, "its descriptor lies outside the file; it was cut short")
    source.seek(at * SECTOR)
    text = source.read(length * SECTOR).split(b"\0", 1)[0].decode("utf-8", "replace")
    values = {key.lower(): value for key, value in re.findall(r'^\s*(\w+)\s*=\s*"?([^"\r\n]*)"?\s*$', text, re.MULTILINE)}
    if values.get("createtype", "streamoptimized").lower() not in _TYPES:
        raise _refused(name, f"it is of type {values['createtype'][:40]}; streamOptimized and monolithicSparse can be imported")
    if values.get("parentcid", _ORPHAN).lower() != _ORPHAN or "parentfilenamehint" in values:
        raise _refused(name, "it lies over a parent disk; export the machine without snapshots")
    if len(re.findall(r"^\s*(?:RW|RDONLY|NOACCESS)\s", text, re.MULTILINE)) > 1:
        raise _refused(name, "it is split into several files")


def _grains(source: BinaryIO, layout: _Layout, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of what was written, front to back."""
    span = layout.grain_bytes * _TABLE_ENTRIES
    count = -(-layout.size_bytes // span)
    source.seek(layout.directory_at)
    content = source.read(4 * count)
    if len(content) < 4 * count:
        raise _refused(name, "its directory is cut short")
    for number, table_at in enumerate(struct.unpack(f"<{count}I", content)):
        if not table_at:
            continue
        source.seek(table_at * SECTOR)
        table = source.read(4 * _TABLE_ENTRIES)
        if len(table) < 4 * _TABLE_ENTRIES:
            raise _refused(name, "one of its tables is cut short")
        for i, grain_at in enumerate(struct.unpack(f"<{_TABLE_ENTRIES}I", table)):
            offset = number * span + i * layout.grain_bytes
            # 1 is a grain of zeros.
            if grain_at > 1 and offset < layout.size_bytes:
                yield offset, _grain(source, grain_at * SECTOR, layout, name)


def _grain(source: BinaryIO, at: int, layout: _Layout, name: str) -> bytes:
    source.seek(at)
    if not layout.is_compressed:
        content = source.read(layout.grain_bytes)
    else:
        head = source.read(12)
        size = struct.unpack("<QI", head)[1] if len(head) == 12 else 0
        if not 0 < size <= 2 * layout.grain_bytes:
            raise _refused(name, "one of its grains has no possible size")
        try:
            # Bounded: a few bytes may say that they are gigabytes.
            content = zlib.decompressobj().decompress(source.read(size), layout.grain_bytes + 1)
        except zlib.error as error:
            raise _refused(name, f"one of its grains cannot be unpacked: {error}") from error
    if not content or len(content) > layout.grain_bytes or len(content) % SECTOR:
        raise _refused(name, "one of its grains is too long or cut short")
    return content


def _refused(name: str, why: str) -> CommandFailed:
    return usage(f"disk {name[:80]}: {why}", code="disk-refused")
