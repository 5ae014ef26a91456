"""A disk of a backup as a file, made while it is read: raw, or a qcow2 whose every byte is known before the first is sent.

    qcow2:  header │ refcount table │ refcount blocks │ L1 │ L2 tables │ the chunks that are not all zeros, in order

What is where follows from which chunks are holes alone, so that a transfer can go on at any offset, with another agent too.
"""

import struct
from array import array
from collections.abc import Sequence
from typing import Protocol

from trimtab_agent.backup.export.content import DiskContent

CLUSTER_BYTES = 64 << 10
_CLUSTER_BITS = 16
_ENTRIES = CLUSTER_BYTES // 8
_REFCOUNTS = CLUSTER_BYTES // 2
_USED_ONCE = 1 << 63
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")


class ImageFile(Protocol):
    size_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """Return a range within the file."""

    def zeros_from(self, offset: int) -> int:
        """Return for how many bytes from here on the file certainly is zeros."""


class RawFile:
    def __init__(self, content: DiskContent) -> None:
        self._content = content
        self.size_bytes = content.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        return self._content.read(offset, length)

    def zeros_from(self, offset: int) -> int:
        length, is_hole = next(self._content.extents(offset, self.size_bytes - offset, limit=1), (0, False))
        return length if is_hole else 0


class Qcow2File:
    """Standalone, version 3, clusters of 64 KiB."""

    def __init__(self, content: DiskContent) -> None:
        self._content = content
        chunk_clusters = content.chunk_bytes // CLUSTER_BYTES
        if not chunk_clusters or content.chunk_bytes % CLUSTER_BYTES:
            raise ValueError(f"a chunk of {content.chunk_bytes} bytes is not made of clusters")
        disk_clusters = -(-content.size_bytes // CLUSTER_BYTES)
        # An array: of a full disk of a terabyte there are sixteen million.
        used = array("Q")
        for chunk in range(-(-content.size_bytes // content.chunk_bytes)):
            if not content.is_hole(chunk):
                used.extend(range(chunk * chunk_clusters, min((chunk + 1) * chunk_clusters, disk_clusters)))
        self._used: Sequence[int] = used
        tables = sorted({cluster // _ENTRIES for cluster in used})
        l1_size = -(-disk_clusters // _ENTRIES)
        l1_clusters = max(1, -(-l1_size // _ENTRIES))
        blocks = refcount_blocks(1 + l1_clusters + len(tables) + len(used))
        table_clusters = -(-blocks // _ENTRIES)
        l1_at = 1 + table_clusters + blocks
        self._data_at = l1_at + l1_clusters + len(tables)
        total = self._data_at + len(used)
        self.size_bytes = total * CLUSTER_BYTES
        head = _header(content.size_bytes, l1_size=l1_size, l1_at=l1_at, table_clusters=table_clusters)
        refcount_table = struct.pack(f">{blocks}Q", *((1 + table_clusters + i) * CLUSTER_BYTES for i in range(blocks)))
        refcounts = struct.pack(">H", 1) * total
        l1 = bytearray(l1_clusters * CLUSTER_BYTES)
        for i, table in enumerate(tables):
            struct.pack_into(">Q", l1, table * 8, (l1_at + l1_clusters + i) * CLUSTER_BYTES | _USED_ONCE)
        l2 = bytearray(len(tables) * CLUSTER_BYTES)
        places = {table: i for i, table in enumerate(tables)}
        for i, cluster in enumerate(used):
            at = places[cluster // _ENTRIES] * CLUSTER_BYTES + cluster % _ENTRIES * 8
            struct.pack_into(">Q", l2, at, (self._data_at + i) * CLUSTER_BYTES | _USED_ONCE)
        self._head = b"".join(
            part.ljust(clusters * CLUSTER_BYTES, b"\0")
            for part, clusters in (
                (head, 1),
                (refcount_table, table_clusters),
                (refcounts, blocks),
                (bytes(l1), l1_clusters),
                (bytes(l2), len(tables)),
            )
        )

    def read(self, offset: int, length: int) -> bytes:
        pieces, end, begin_of_data = [], offset + length, len(self._head)
        if offset < begin_of_data:
            pieces.append(self._head[offset : min(end, begin_of_data)])
            offset = begin_of_data
        while offset < end:
            at, within = divmod(offset - begin_of_data, CLUSTER_BYTES)
            count = min(end - offset, CLUSTER_BYTES - within)
            pieces.append(self._of_disk(self._used[at] * CLUSTER_BYTES + within, count))
            offset += count
        return b"".join(pieces)

    def zeros_from(self, offset: int) -> int:  # noqa: ARG002 - what is zeros is not in the file
        return 0

    def _of_disk(self, offset: int, count: int) -> bytes:
        """Return bytes of the disk; its last cluster may be short."""
        there = max(0, min(count, self._content.size_bytes - offset))
        return self._content.read(offset, there).ljust(count, b"\0")


def refcount_blocks(other_clusters: int) -> int:
    """Return how many blocks of reference counts count everything, themselves and their table too."""
    blocks = 1
    while blocks * _REFCOUNTS < other_clusters + blocks + -(-blocks // _ENTRIES):
        blocks += 1
    return blocks


def _header(size_bytes: int, *, l1_size: int, l1_at: int, table_clusters: int) -> bytes:
    return _HEADER.pack(
        b"QFI\xfb",
        3,
        0,
        0,
        _CLUSTER_BITS,
        size_bytes,
        0,
        l1_size,
        l1_at * CLUSTER_BYTES,
        CLUSTER_BYTES,
        table_clusters,
        0,
        0,
        0,
        0,
        0,
        4,
        _HEADER.size,
    )


def image_file(content: DiskContent, format: str) -> ImageFile:
    """Return the disk as a file of this format: raw or qcow2."""
    return RawFile(content) if format == "raw" else Qcow2File(content)
