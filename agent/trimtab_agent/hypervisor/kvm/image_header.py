"""Reads what an image file claims to be, with code of our own, before any QEMU tool touches it.

Refusing is the point: what is let through is raw without any known magic, qcow2 version 2 or 3 that refers to nothing outside
itself, and ISO 9660. QEMU's own readers copied host files into "converted" images for each of the references refused here
(CVE-2015-5163, CVE-2022-47951, CVE-2024-32498, CVE-2024-40767).
Layout: docs/interop/qcow2.rst of QEMU. All numbers there are big-endian.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DiskFormat

QCOW2_MAGIC = b"QFI\xfb"
_HEADER_BYTES = 65536
_ISO_MAGIC_AT, _ISO_MAGIC = 32769, b"CD001"
_V2_LENGTH, _V3_LENGTH = 72, 104
_MAX_HEADER_LENGTH = 4096
_MIN_CLUSTER_BITS, _MAX_CLUSTER_BITS = 9, 21
_MAX_L1_BYTES = 32 << 20
_MAX_REFCOUNT_TABLE_BYTES = 8 << 20
_SECTOR = 512
_MAX_BACKING_NAME = 1023

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1, 2, 4, 8, 16
_KNOWN_INCOMPATIBLE = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_RAW_EXTERNAL_AUTOCLEAR = 2
_EXTENSION_END, _EXTENSION_LUKS, _EXTENSION_DATA_FILE = 0, 0x0537BE77, 0x44415441

_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, QCOW2_MAGIC, "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk Descriptor", "vmdk"),
    (0, b"#Disk Descriptor", "vmdk"),
    (0, b"OOOH", "cow"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)
_TRAILERS: tuple[tuple[int, bytes, str], ...] = ((512, b"koly", "dmg"), (512, b"conectix", "vpc"))
"""Bytes before the end → magic: formats that hide at the end of what looks raw."""


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """The part of a qcow2 header that others ask for."""

    version: int
    virtual_size_bytes: int
    cluster_bytes: int
    backing_file: str
    """Empty where the image has none; a volume of ours that is a linked clone has one."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an acceptable image is."""

    format: DiskFormat
    virtual_size_bytes: int


def check_image(file: BinaryIO, declared: DiskFormat, *, max_bytes: int) -> ImageFacts:
    """Return the facts of an acceptable image of the declared format. InvalidRequest says why it is refused.

    `max_bytes` bounds the virtual size; 0: no bound. `file` must be seekable; its position is lost.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    if size_bytes == 0:
        raise InvalidRequest("image-empty", "the image has no content")
    detected = detect(file, size_bytes)
    if detected not in _acceptable(declared):
        raise InvalidRequest(
            "image-format-mismatch",
            f"the image is declared as {declared.value} but looks like {detected}",
            detected=detected,
        )
    if declared is DiskFormat.QCOW2:
        header = read_qcow2(file, size_bytes)
        if header.backing_file:
            raise _refused("image-has-backing-file", "it refers to a backing file")
        virtual_size_bytes = header.virtual_size_bytes
    else:
        virtual_size_bytes = -(-size_bytes // _SECTOR) * _SECTOR
    if virtual_size_bytes == 0:
        raise InvalidRequest("image-empty", "the image's virtual size is 0")
    if max_bytes and virtual_size_bytes > max_bytes:
        raise InvalidRequest(
            "image-too-large",
            f"the image's virtual size is {virtual_size_bytes} bytes; at most {max_bytes} are allowed",
            field="max_bytes",
        )
    return ImageFacts(format=declared, virtual_size_bytes=virtual_size_bytes)


def detect(file: BinaryIO, size_bytes: int) -> str:
    """Return the name of the format that the content looks like; `raw` where no magic is known."""
    start = _read_at(file, 0, 4096)
    for offset, magic, name in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return name
    if start.lstrip(b"\0 \t\r\n").startswith((b"# Disk Descriptor", b"json:", b'{"driver', b"{'driver")):
        return "descriptor"
    for distance, magic, name in _TRAILERS:
        if size_bytes >= distance and _read_at(file, size_bytes - distance, len(magic)) == magic:
            return name
    if _read_at(file, _ISO_MAGIC_AT, len(_ISO_MAGIC)) == _ISO_MAGIC:
        return "iso"
    return "raw"


def _acceptable(declared: DiskFormat) -> tuple[str, ...]:
    match declared:
        case DiskFormat.QCOW2:
            return ("qcow2",)
        case DiskFormat.ISO:
            return ("iso",)
        case DiskFormat.RAW:
            # A hybrid ISO is a disk with a partition table too; as raw it refers to nothing either way.
            return ("raw", "iso")


def read_qcow2(file: BinaryIO, size_bytes: int, *, is_ours: bool = False) -> Qcow2Header:
    """Return the header of a qcow2 image that is whole and refers to nothing but, perhaps, a backing file.

    `is_ours`: a volume in use, which may hold snapshots and be marked dirty, since a guest writes to it right now.
    """
    header = _read_at(file, 0, _HEADER_BYTES)
    if len(header) < _V2_LENGTH or header[:4] != QCOW2_MAGIC:
        raise _refused("image-truncated", "its header is cut short")
    (version, backing_offset, backing_length, cluster_bits, virtual_size, crypt_method, l1_entries, l1_offset) = (
        struct.unpack_from(">IQIIQIIQ", header, 4)
    )
    refcount_offset, refcount_clusters, snapshots = struct.unpack_from(">QII", header, 48)
    if version not in (2, 3):
        raise _refused("image-version", f"qcow2 version {version} is not 2 or 3")
    if not _MIN_CLUSTER_BITS <= cluster_bits <= _MAX_CLUSTER_BITS:
        raise _refused("image-malformed", "its cluster size is out of range")
    if crypt_method:
        raise _refused("image-encrypted", "it is encrypted")
    if snapshots and not is_ours:
        raise _refused("image-has-snapshots", "it holds internal snapshots; flatten it with `qemu-img convert`")
    cluster_bytes = 1 << cluster_bits
    header_length = _check_features(header, is_ours=is_ours) if version == 3 else _V2_LENGTH
    _check_extensions(header, header_length, end=backing_offset or cluster_bytes)
    _check_tables(
        size_bytes,
        cluster_bytes,
        virtual_size,
        l1=(l1_offset, l1_entries),
        refcounts=(refcount_offset, refcount_clusters),
    )
    return Qcow2Header(
        version=version,
        virtual_size_bytes=virtual_size,
        cluster_bytes=cluster_bytes,
        backing_file=_backing_file(header, backing_offset, backing_length, cluster_bytes),
    )


def qcow2_backing_file(read: Callable[[int, int], bytes]) -> str:
    """Return the path that a qcow2 file of ours lies over, "" for none; `read` takes length and offset. Two small reads."""
    start = read(20, 0)
    if len(start) < 20 or start[:4] != QCOW2_MAGIC:
        raise _refused("image-truncated", "its header is cut short")
    offset, length = struct.unpack_from(">QI", start, 8)
    if not offset:
        return ""
    return read(min(length, _MAX_BACKING_NAME), offset).decode(errors="replace")


def qcow2_virtual_size(start: bytes) -> int:
    """Return the virtual size that the first 32 bytes of a qcow2 file of ours tell; cheap enough for every volume of a pool."""
    if len(start) < 32 or start[:4] != QCOW2_MAGIC:
        raise _refused("image-truncated", "its header is cut short")
    return int(struct.unpack_from(">Q", start, 24)[0])


def _check_features(header: bytes, *, is_ours: bool) -> int:
    """Check a version 3 header's feature bits and return its length."""
    if len(header) < _V3_LENGTH:
        raise _refused("image-truncated", "its header is cut short")
    incompatible, _compatible, autoclear, refcount_order, header_length = struct.unpack_from(">QQQII", header, 72)
    if incompatible & _DATA_FILE or autoclear & _RAW_EXTERNAL_AUTOCLEAR:
        raise _refused("image-has-data-file", "it refers to an external data file")
    if incompatible & ~_KNOWN_INCOMPATIBLE:
        raise _refused("image-feature-unknown", f"it uses unknown features ({incompatible:#x})")
    if incompatible & (_DIRTY | _CORRUPT) and not is_ours:
        raise _refused("image-not-clean", "it was not closed cleanly; repair it with `qemu-img check -r all`")
    if not _V3_LENGTH <= header_length <= _MAX_HEADER_LENGTH or header_length % 8 or refcount_order > 6:
        raise _refused("image-malformed", "its header is malformed")
    if incompatible & _COMPRESSION and header_length > _V3_LENGTH and header[_V3_LENGTH] not in (0, 1):
        raise _refused("image-feature-unknown", "it uses an unknown compression")
    return int(header_length)


def _check_extensions(header: bytes, start: int, *, end: int) -> None:
    position, end = start, min(end, len(header))
    while position + 8 <= end:
        kind, length = struct.unpack_from(">II", header, position)
        if kind == _EXTENSION_END:
            return
        if kind == _EXTENSION_DATA_FILE:
            raise _refused("image-has-data-file", "it refers to an external data file")
        if kind == _EXTENSION_LUKS:
            raise _refused("image-encrypted", "it is encrypted")
        if position + 8 + length > end:
            raise _refused("image-malformed", "a header extension reaches beyond the header")
        position += 8 + (length + 7) // 8 * 8


def _check_tables(
    size_bytes: int, cluster_bytes: int, virtual_size: int, *, l1: tuple[int, int], refcounts: tuple[int, int]
) -> None:
    l1_offset, l1_entries = l1
    refcount_offset, refcount_clusters = refcounts
    if l1_entries * 8 > _MAX_L1_BYTES or refcount_clusters * cluster_bytes > _MAX_REFCOUNT_TABLE_BYTES:
        raise _refused("image-malformed", "its tables are larger than any real image's")
    # An L2 table of 8 or 16 byte entries maps at least this much; fewer L1 entries than that cannot hold the disk.
    if l1_entries * (cluster_bytes // 8) * cluster_bytes < virtual_size:
        raise _refused("image-malformed", "its tables are smaller than its virtual size")
    for offset, length in ((l1_offset, l1_entries * 8), (refcount_offset, refcount_clusters * cluster_bytes)):
        if offset % cluster_bytes or (length and offset == 0):
            raise _refused("image-malformed", "a table is misplaced")
        if offset > size_bytes or (length and offset >= size_bytes):
            raise _refused("image-truncated", "a table lies beyond the end of the file")


def _backing_file(header: bytes, offset: int, length: int, cluster_bytes: int) -> str:
    if offset == 0:
        return ""
    if not 0 < length <= 1023 or offset + length > min(cluster_bytes, len(header)):
        raise _refused("image-malformed", "the name of its backing file is misplaced")
    return header[offset : offset + length].decode(errors="replace")


def _refused(code: str, why: str) -> InvalidRequest:
    return InvalidRequest(code, f"the image is refused: {why}")


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
