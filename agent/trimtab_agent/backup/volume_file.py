"""An empty volume's file, filled without QEMU in between: bytes go to where they stay, and what refers to them follows once they do.

    qcow2:  what QEMU made: header, tables │ per table of a half GiB: L2 table, its data │ further blocks of reference counts

QEMU's header, L1 table and table of reference counts stay where they are: only their entries are filled in, after everything that they
refer to is durable. So a restore that dies leaves an empty volume, and never one that half looks like a disk. `qemu-nbd` was used
before: copying each byte through it cost twice the CPU of opening and checking the backup.
"""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from trimtab_protos.errors import Conflict, InvalidRequest

CLUSTER_BYTES = 64 << 10
_ENTRIES = CLUSTER_BYTES // 8
_REFCOUNTS = CLUSTER_BYTES // 2
_USED_ONCE = 1 << 63
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_LOCK = struct.Struct("@hhqqi4x")
_QEMU_LOCKS_AT, _QEMU_LOCKS = 100, 200
"""QEMU tells others by locks on these bytes that it has an image open (block/file-posix.c)."""
_SYNC_EVERY_BYTES = 64 << 20
"""The target's disk writes while chunks are still fetched, instead of all of it at the end."""


_per_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Place:
    """A range of the disk, and where in the file it lies."""

    offset: int
    length: int
    at: int


class VolumeFile:
    """A volume that is open for being filled. A context manager; `write` may be called by several threads, the rest by one.

    Conflict `image-locked` where a QEMU has it open, `volume-size-differs` where it is not of the size.
    """

    def __init__(self, file: Path, *, format: str, size_bytes: int, sync: Callable[[int], None] = os.fdatasync) -> None:
        """`sync` makes a file durable, by its descriptor: a test sees by it what was written before what."""
        self._sync = sync
        self._descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: Future[None] | None = None
        self._lock = threading.Lock()
        self._unsynced = 0
        try:
            _lock_against_qemu(self._descriptor)
            self._layout = _layout_of(self._descriptor, format)
            if self._layout.size_bytes != size_bytes:
                raise Conflict(
                    "volume-size-differs",
                    f"the volume has {self._layout.size_bytes} bytes and the disk of the backup {size_bytes}",
                    field="size_bytes",
                )
        except BaseException:
            self.close()
            raise

    def place(self, offset: int, length: int) -> int:
        """Return where in the file a range of the disk lies. Ranges come in ascending order and begin at a cluster."""
        return self._layout.place(offset, length, self._put)

    def write(self, at: int, content: bytes) -> None:
        """Write at a place of the file."""
        self._put(at, content)
        with self._lock:
            self._unsynced += len(content)
            if self._unsynced < _SYNC_EVERY_BYTES or not (self._syncing is None or self._syncing.done()):
                return
            before, self._unsynced = self._syncing, 0
            self._syncing = self._syncer.submit(self._sync, self._descriptor)
        if before is not None:
            before.result()

    def reads_back(self, at: int, content: bytes) -> bool:
        """Tell whether the file holds at a place what was written there. From any thread."""
        read = getattr(_per_thread, "read", None)
        if read is None or len(read) != len(content):
            read = _per_thread.read = bytearray(len(content))
        return os.preadv(self._descriptor, [read], at) == len(content) and read == content

    def places(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Place]:
        """Yield where ranges of the disk lie that were placed in this order; it needs no memory, and the file may be closed."""
        layout = self._layout.fresh()
        for offset, length in ranges:
            yield Place(offset, length, layout.place(offset, length, _nowhere))

    def finish(self) -> None:
        """Make everything durable, then what refers to it."""
        if self._syncing is not None:
            self._syncing.result()
        self._layout.place_counts(self._put)
        self._sync(self._descriptor)
        if self._layout.refer(self._put):
            self._sync(self._descriptor)

    def close(self) -> None:
        self._syncer.shutdown(wait=True)
        os.close(self._descriptor)

    def __enter__(self) -> "VolumeFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _put(self, at: int, content: bytes | bytearray) -> None:
        view = memoryview(content)
        while view:
            written = os.pwrite(self._descriptor, view, at)
            at, view = at + written, view[written:]


Put = Callable[[int, bytes | bytearray], None]


def _nowhere(_at: int, _content: bytes | bytearray) -> None: ...


class _Layout(Protocol):
    size_bytes: int

    def fresh(self) -> "_Layout":
        """Return the layout as it was before anything was placed."""

    def place(self, offset: int, length: int, put: Put) -> int: ...

    def place_counts(self, put: Put) -> None: ...

    def refer(self, put: Put) -> bool:
        """Write what refers to the data; tell whether there is such a thing."""


class _Raw:
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def fresh(self) -> "_Raw":
        return self

    def place(self, offset: int, length: int, put: Put) -> int:  # noqa: ARG002 - a raw file has no tables
        return offset

    def place_counts(self, put: Put) -> None: ...

    def refer(self, put: Put) -> bool:  # noqa: ARG002
        return False


class _Qcow2:
    """Appends to a fresh image, whose own clusters stay as they are."""

    def __init__(self, header: bytes, *, first_block: int, file_bytes: int) -> None:
        """`first_block`: where the first reference counts lie, the first entry of their table."""
        (magic, version, backing, _, cluster_bits, self.size_bytes, encryption, _, self._l1_at, self._counts_at) = _HEADER.unpack(
            header
        )[:10]
        (self._counts_clusters, snapshots, _, features, _, _, order, _) = _HEADER.unpack(header)[10:]
        is_plain = (magic, version, 1 << cluster_bits, order) == (b"QFI\xfb", 3, CLUSTER_BYTES, 4) and first_block
        if not is_plain or backing or encryption or snapshots or features:
            raise Conflict("volume-not-empty", "the volume is no fresh qcow2 file without a backing file")
        self._made_of = (header, first_block, file_bytes)
        self._end = -(-file_bytes // CLUSTER_BYTES)
        self._blocks = [first_block]
        self._tables: dict[int, int] = {}
        self._table = -1
        self._l2 = bytearray()

    def fresh(self) -> "_Qcow2":
        header, first_block, file_bytes = self._made_of
        return _Qcow2(header, first_block=first_block, file_bytes=file_bytes)

    def place(self, offset: int, length: int, put: Put) -> int:
        first, within = divmod(offset, CLUSTER_BYTES)
        end = first - (-length // CLUSTER_BYTES)
        table = first // _ENTRIES
        if within or (end - 1) // _ENTRIES != table or table < self._table:
            raise ValueError(
                f"{offset}+{length} does not begin at a cluster, or reaches over the end of a table, or comes too late"
            )
        if table != self._table:
            self._end_table(put)
            self._table, self._tables[table], self._l2 = table, self._end * CLUSTER_BYTES, bytearray(CLUSTER_BYTES)
            self._end += 1
        begin, self._end = self._end, self._end + end - first
        entries = ((at * CLUSTER_BYTES) | _USED_ONCE for at in range(begin, self._end))
        struct.pack_into(f">{end - first}Q", self._l2, first % _ENTRIES * 8, *entries)
        return begin * CLUSTER_BYTES

    def place_counts(self, put: Put) -> None:
        self._end_table(put)
        count = 1
        while count * _REFCOUNTS < self._end + count - 1:
            count += 1
        if count > self._counts_clusters * _ENTRIES:
            most = self._counts_clusters * _ENTRIES * _REFCOUNTS * CLUSTER_BYTES >> 40
            raise InvalidRequest(
                "restore-too-large", f"the disk holds more than {most} TiB; restore it with `--instant`", field="size_bytes"
            )
        self._blocks += [at * CLUSTER_BYTES for at in range(self._end, self._end + count - 1)]
        self._end += count - 1
        for number, at in enumerate(self._blocks):
            used = min(_REFCOUNTS, self._end - number * _REFCOUNTS)
            put(at, struct.pack(">H", 1) * used + bytes(2 * (_REFCOUNTS - used)))

    def refer(self, put: Put) -> bool:
        if self._blocks[1:]:
            put(self._counts_at + 8, struct.pack(f">{len(self._blocks) - 1}Q", *self._blocks[1:]))
        for table, at in self._tables.items():
            put(self._l1_at + table * 8, struct.pack(">Q", at | _USED_ONCE))
        return True

    def _end_table(self, put: Put) -> None:
        if self._tables:
            put(self._tables[self._table], self._l2)


def _layout_of(descriptor: int, format: str) -> _Layout:
    """The format is told and never probed; what a header says of a file that is told to be qcow2 is checked."""
    file_bytes = os.fstat(descriptor).st_size
    if format == "raw":
        return _Raw(file_bytes)
    header = os.pread(descriptor, _HEADER.size, 0)
    if format != "qcow2" or len(header) < _HEADER.size:
        raise Conflict("volume-not-empty", f"the volume is no {format} file that could be filled")
    counts_at = _HEADER.unpack(header)[9]
    first_block = int.from_bytes(os.pread(descriptor, 8, counts_at), "big") if counts_at < file_bytes else 0
    return _Qcow2(header, first_block=first_block, file_bytes=file_bytes)


def _lock_against_qemu(descriptor: int) -> None:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _QEMU_LOCKS_AT, _QEMU_LOCKS, 0))
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            raise Conflict("image-locked", "the volume is in use by another QEMU, on this host or on another") from error
        if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:  # storage without locks: QEMU goes without, too
            raise
