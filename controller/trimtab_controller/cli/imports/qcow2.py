"""Writes a qcow2 file front to back: what was never written takes no room, in the file and on its way to a host."""

import struct
from typing import BinaryIO

CLUSTER_BYTES = 64 << 10
_L2_ENTRIES = CLUSTER_BYTES // 8
_REFCOUNTS_PER_BLOCK = CLUSTER_BYTES // 2
_COPIED = 1 << 63


class Qcow2Writer:
    """Takes content in ascending order of offsets; `finish` makes it a file that can be read."""

    def __init__(self, target: BinaryIO, size_bytes: int) -> None:
        self._target = target
        self._size_bytes = size_bytes
        self._next_cluster = 1  # the first is the header's
        self._tables: dict[int, dict[int, int]] = {}
        self._at = -1
        self._buffer = bytearray()
        target.seek(CLUSTER_BYTES)

    def write(self, offset: int, content: bytes) -> None:
        """Write content at an offset that is not before the end of what was written last."""
        while content:
            index, within = divmod(offset, CLUSTER_BYTES)
            if index < self._at:
                raise ValueError("qcow2 is written front to back")
            if index != self._at:
                self._flush()
                self._at, self._buffer = index, bytearray(CLUSTER_BYTES)
            part = content[: CLUSTER_BYTES - within]
            self._buffer[within : within + len(part)] = part
            offset, content = offset + len(part), content[len(part) :]

    def finish(self) -> None:
        self._flush()
        l1_entries = max(1, -(-self._size_bytes // (CLUSTER_BYTES * _L2_ENTRIES)))
        l1 = [0] * l1_entries
        for number, table in sorted(self._tables.items()):
            entries = [0] * _L2_ENTRIES
            for i, cluster in table.items():
                entries[i] = cluster * CLUSTER_BYTES | _COPIED
            l1[number] = self._append(struct.pack(f">{_L2_ENTRIES}Q", *entries)) * CLUSTER_BYTES | _COPIED
        l1_at = self._append(struct.pack(f">{l1_entries}Q", *l1))
        table_at, table_clusters = self._refcounts()
        header = struct.pack(">4sIQIIQ", b"QFI\xfb", 3, 0, 0, 16, self._size_bytes)
        header += struct.pack(">IIQQIIQ", 0, l1_entries, l1_at * CLUSTER_BYTES, table_at * CLUSTER_BYTES, table_clusters, 0, 0)
        header += struct.pack(">QQQII", 0, 0, 0, 4, 104)
        self._target.seek(0)
        self._target.write(header.ljust(CLUSTER_BYTES, b"\0"))

    def _flush(self) -> None:
        if self._at >= 0 and any(self._buffer):
            number, i = divmod(self._at, _L2_ENTRIES)
            self._tables.setdefault(number, {})[i] = self._append(bytes(self._buffer))
        self._at = -1

    def _append(self, content: bytes) -> int:
        """Write whole clusters at the end; return the first one's number."""
        first = self._next_cluster
        padded = content.ljust(-(-len(content) // CLUSTER_BYTES) * CLUSTER_BYTES, b"\0")
        self._target.write(padded)
        self._next_cluster += len(padded) // CLUSTER_BYTES
        return first

    def _refcounts(self) -> tuple[int, int]:
        """Write the reference counts, their own clusters among what they count; return their table's cluster and its length."""
        used, blocks, table = self._next_cluster, 0, 1
        while blocks * _REFCOUNTS_PER_BLOCK < used + blocks + table:
            blocks = -(-(used + blocks + table) // _REFCOUNTS_PER_BLOCK)
            table = max(1, -(-blocks * 8 // CLUSTER_BYTES))
        counted = used + blocks + table
        firsts = []
        for i in range(blocks):
            ones = min(_REFCOUNTS_PER_BLOCK, counted - i * _REFCOUNTS_PER_BLOCK)
            firsts.append(self._append(b"\0\1" * ones))
        content = struct.pack(f">{blocks}Q", *(first * CLUSTER_BYTES for first in firsts))
        return self._append(content.ljust(table * CLUSTER_BYTES, b"\0")), table
