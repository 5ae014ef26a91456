"""Small disks, stores in memory and stores that fail: what the tests of the repository share."""

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.blobs import BlobEntry, BlobStore
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.manifests import Consistency, Manifest, Subject
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.repository.repository import Repository, create_repository, open_repository
from trimtab_agent.backup.repository.writer import BackupWriter, DiskWriter, begin_backup
from trimtab_protos.errors import Unavailable

Result = TypeVar("Result")
CHUNK = 4096
FLEET = "fleet-1"
KEY = RepositoryKey(bytes(range(32)))


class MemoryBlobs:
    """Keeps the promises of a store, in memory."""

    where = "memory"

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put_new(self, name: str, parts: Sequence[bytes]) -> None:
        with self._lock:
            if name in self.blobs:
                raise errors.blob_exists(name)
            self.blobs[name] = b"".join(parts)

    def put(self, name: str, content: bytes) -> None:
        self.blobs[name] = content

    def get(self, name: str) -> bytes:
        if name not in self.blobs:
            raise errors.blob_missing(name)
        return self.blobs[name]

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        return self.get(name)[offset : offset + length]

    def list(self, prefix: str) -> Sequence[BlobEntry]:
        return [BlobEntry(name, len(blob)) for name, blob in sorted(self.blobs.items()) if name.startswith(prefix)]

    def delete(self, name: str) -> None:
        self.blobs.pop(name, None)

    def remove_debris(self, older_than_s: float) -> int:
        return 0

    def close(self) -> None:
        """Nothing is held open."""

    def flip_bit(self, name: str, at: int) -> None:
        blob = bytearray(self.blobs[name])
        blob[at % len(blob)] ^= 1 << (at % 8)
        self.blobs[name] = bytes(blob)

    def names(self, prefix: str) -> Sequence[str]:
        return [entry.name for entry in self.list(prefix)]


Fault = Callable[[str, str], str]
"""Verb and name of a blob → "pass", "fail" (nothing done), "lost" (done, and the answer lost)."""


class FaultyBlobs:
    """Another store, with faults before or after each call."""

    def __init__(self, inner: BlobStore, fault: Fault) -> None:
        self._inner = inner
        self.fault = fault
        self.calls = 0

    @property
    def where(self) -> str:
        return self._inner.where

    def put_new(self, name: str, parts: Sequence[bytes]) -> None:
        self._run("put_new", name, lambda: self._inner.put_new(name, parts))

    def put(self, name: str, content: bytes) -> None:
        self._run("put", name, lambda: self._inner.put(name, content))

    def get(self, name: str) -> bytes:
        return self._run("get", name, lambda: self._inner.get(name))

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        return self._run("get_range", name, lambda: self._inner.get_range(name, offset, length))

    def list(self, prefix: str) -> Sequence[BlobEntry]:
        return self._run("list", prefix, lambda: self._inner.list(prefix))

    def delete(self, name: str) -> None:
        self._run("delete", name, lambda: self._inner.delete(name))

    def remove_debris(self, older_than_s: float) -> int:
        return self._run("remove_debris", "", lambda: self._inner.remove_debris(older_than_s))

    def close(self) -> None:
        self._inner.close()

    def _run(self, verb: str, name: str, do: Callable[[], Result]) -> Result:
        self.calls += 1
        match self.fault(verb, name):
            case "fail":
                raise errors.repository_unreachable(name, f"{verb} was made to fail")
            case "lost":
                with suppress(Unavailable):
                    do()
                raise errors.repository_unreachable(name, f"the answer to {verb} was lost")
            case _:
                return do()


class Disk:
    """A guest's disk as it is now, and what changed since the last backup that was listed."""

    def __init__(self, chunks: int, *, tail: int = 0, seed: int = 0) -> None:
        self.content = bytearray(chunks * CHUNK + tail)
        self.dirty: set[int] = set()
        self.random = random.Random(seed)

    @property
    def chunk_count(self) -> int:
        return -(-len(self.content) // CHUNK)

    def write(self, chunk: int, content: bytes | None = None) -> None:
        begin = chunk * CHUNK
        length = min(CHUNK, len(self.content) - begin)
        self.content[begin : begin + length] = (content or self.random.randbytes(CHUNK))[:length]
        self.dirty.add(chunk)

    def chunk(self, number: int) -> bytes:
        return bytes(self.content[number * CHUNK : (number + 1) * CHUNK])


def subject(vm: str = "vm-1", *, project: str = "project-1", fleet: str = FLEET) -> Subject:
    return Subject(fleet, project, vm, f"name of {vm}")


def new_repository(
    blobs: BlobStore, *, clock: ManualClock | None = None, key: RepositoryKey = KEY, project: str = ""
) -> Repository:
    clock = clock or ManualClock()
    create_repository(blobs, key, fleet_id=FLEET, project_id=project, clock=clock)
    return reopen(blobs, clock=clock, key=key)


def reopen(
    blobs: BlobStore, *, clock: ManualClock | None = None, key: RepositoryKey = KEY, fleet: str | None = FLEET
) -> Repository:
    return open_repository(blobs, key, fleet_id=fleet, clock=clock or ManualClock(), holder="host1")


def put_disk(writer: BackupWriter, disk: Disk, *, name: str = "vda") -> DiskWriter:
    """Put what is needed: all of the disk without a base, else what changed and what must be repaired."""
    base = writer.base.disk(name) if writer.base else None
    opened = writer.open_disk(name, len(disk.content), base=base, chunk_bytes=CHUNK)
    wanted = range(disk.chunk_count) if base is None else sorted(disk.dirty | set(opened.repairs()))
    for chunk in wanted:
        opened.put(chunk, disk.chunk(chunk))
    return opened


def back_up(
    repository: Repository,
    disk: Disk,
    backup_id: str,
    *,
    base_id: str | None = None,
    vm: str = "vm-1",
    files: dict[str, bytes] | None = None,
) -> Manifest:
    with begin_backup(repository, subject(vm), backup_id, base_id=base_id) as writer:
        opened = put_disk(writer, disk)
        for name, content in (files or {}).items():
            writer.attach(name, content)
        manifest = writer.commit([writer.finish(opened)], created_ms=repository.clock.now_ms(), consistency=Consistency.CRASH)
    disk.dirty.clear()
    return manifest


def restore(repository: Repository, backup_id: str, *, vm: str = "vm-1", name: str = "vda") -> bytes:
    with open_backup(repository, vm, backup_id) as reader:
        disk = reader.disk(name)
        target = bytearray(disk.manifest.size_bytes)

        def write(offset: int, content: bytes) -> None:
            target[offset : offset + len(content)] = content

        disk.copy_to(write)
        return bytes(target)
