"""What a backup consists of: the manifest, written last, and the pages that its disks point to.

A page is the list of ids of `PAGE_CHUNKS` chunks in their order; a disk is a sparse table of pages. A backup without a manifest does
not exist, and one with a manifest needs nothing but the chunks that its pages name: there is no chain.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from blake3 import blake3

from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.sealing import HOLE, ID_BYTES

PREFIX = "backups/"
PAGE_CHUNKS = 1024
FORMAT = 1
REVOKED = b"TTREVOKED\x01\n"
"""Stands in a manifest's place once prune has ended the session that would have written it."""

CHUNK_BYTES = 256 * 1024
LARGE_DISK_BYTES = 2 << 40
LARGE_CHUNK_BYTES = 1 << 20


class Consistency(StrEnum):
    """What the guest knew of the instant that was copied."""

    CRASH = "crash"
    FILESYSTEM = "filesystem"
    APPLICATION = "application"


def chunk_bytes_for(size_bytes: int) -> int:
    """Return the chunk size of a disk: small ones keep increments small, on huge disks the ids alone would be gigabytes."""
    return LARGE_CHUNK_BYTES if size_bytes > LARGE_DISK_BYTES else CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class DiskManifest:
    name: str
    """As the vm names it: vda."""
    size_bytes: int
    chunk_bytes: int
    pages: Mapping[int, bytes]
    """Number of the page → its id; a page of holes is absent."""
    volume_id: str = ""
    generation: int = 0
    """Of the volume's content: raised by a revert or restore, after which no earlier backup is a base."""
    checkpoint: str = ""
    """The libvirt checkpoint made in the same instant: the base of the next increment."""
    full_reason: str = ""
    """Why all of the disk was read; empty for an increment."""
    dirty_bytes: int = 0
    read_bytes: int = 0
    stored_bytes: int = 0

    @property
    def chunk_count(self) -> int:
        return -(-self.size_bytes // self.chunk_bytes)

    @property
    def page_count(self) -> int:
        return -(-self.chunk_count // PAGE_CHUNKS)

    @property
    def root(self) -> str:
        """Names the whole content of the disk: two disks with one root hold the same bytes."""
        digest = blake3(f"{self.size_bytes}|{self.chunk_bytes}".encode())
        for number in range(self.page_count):
            digest.update(self.pages.get(number, HOLE))
        return digest.hexdigest()

    def length_of(self, chunk: int) -> int:
        """Return the bytes of a chunk; the last one of a disk may be short."""
        return min(self.chunk_bytes, self.size_bytes - chunk * self.chunk_bytes)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A small file of the vm: its domain XML, NVRAM, TPM state."""

    name: str
    size_bytes: int
    chunks: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose backup it is."""

    fleet_id: str
    project_id: str
    vm_id: str
    vm_name: str


@dataclass(frozen=True, slots=True)
class Manifest:
    backup_id: str
    subject: Subject
    created_ms: int
    """When the copied instant was, wall clock."""
    consistency: Consistency
    disks: Sequence[DiskManifest]
    attachments: Sequence[Attachment] = ()
    base_id: str = ""
    """The backup whose pages the untouched chunks were taken from; for people, nothing depends on it."""
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return manifest_name(self.subject.vm_id, self.backup_id)

    def disk(self, name: str) -> DiskManifest | None:
        return next((disk for disk in self.disks if disk.name == name), None)


def manifest_name(vm_id: str, backup_id: str) -> str:
    return f"{PREFIX}{vm_id}/{backup_id}"


def encode_manifest(manifest: Manifest) -> bytes:
    document = {
        "format": FORMAT,
        "backup_id": manifest.backup_id,
        "subject": asdict(manifest.subject),
        "created_ms": manifest.created_ms,
        "consistency": manifest.consistency.value,
        "base_id": manifest.base_id,
        "notes": dict(manifest.notes),
        "disks": [_disk_document(disk) for disk in manifest.disks],
        "attachments": [
            {"name": file.name, "size_bytes": file.size_bytes, "chunks": [id.hex() for id in file.chunks]}
            for file in manifest.attachments
        ],
    }
    return json.dumps(document, separators=(",", ":")).encode()


def decode_manifest(content: bytes, name: str) -> Manifest:
    """Return the manifest that the blob `name` holds. Conflict where it is another one's, InvalidRequest where it is newer."""
    try:
        document = json.loads(content)
        if document["format"] != FORMAT:
            raise errors.format_unknown(name, document["format"])
        manifest = Manifest(
            backup_id=document["backup_id"],
            subject=Subject(**document["subject"]),
            created_ms=int(document["created_ms"]),
            consistency=Consistency(document["consistency"]),
            base_id=document["base_id"],
            notes=document["notes"],
            disks=[_disk_of(disk) for disk in document["disks"]],
            attachments=[
                Attachment(file["name"], int(file["size_bytes"]), [bytes.fromhex(id) for id in file["chunks"]])
                for file in document["attachments"]
            ],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise errors.damaged(name, "its content cannot be parsed") from error
    if manifest.name != name:
        raise errors.damaged(name, f"it is the manifest of {manifest.name}")
    return manifest


def encode_page(ids: Sequence[bytes]) -> bytes:
    return b"".join(ids)


def decode_page(content: bytes) -> Sequence[bytes]:
    return [content[at : at + ID_BYTES] for at in range(0, len(content), ID_BYTES)]


def _disk_document(disk: DiskManifest) -> dict[str, Any]:
    document = {name: getattr(disk, name) for name in DiskManifest.__slots__ if name != "pages"}
    document["pages"] = {str(number): id.hex() for number, id in sorted(disk.pages.items())}
    document["root"] = disk.root
    return document


def _disk_of(document: dict[str, Any]) -> DiskManifest:
    pages = {int(number): bytes.fromhex(id) for number, id in document["pages"].items()}
    disk = DiskManifest(**{**{key: value for key, value in document.items() if key != "root"}, "pages": pages})
    if disk.root != document["root"]:
        raise ValueError("the root of a disk does not match its pages")
    return disk
