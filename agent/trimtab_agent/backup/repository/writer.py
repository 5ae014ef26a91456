"""Writing a backup: chunks go in in any order, from one thread; the backup is listed by `commit` or not at all.

    begin_backup ── open_disk ── put … ── finish ──► commit ── listed
                                             └──────► abort  ── nothing but garbage for prune

Order on storage: packs, index, manifest, each durable before the next. A killed writer leaves packs that nothing names.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from trimtab_agent.backup.repository import chunk_index, errors
from trimtab_agent.backup.repository.chunk_index import ENTRIES_PER_FILE, IndexedPack, encode_index
from trimtab_agent.backup.repository.manifests import (
    PAGE_CHUNKS,
    REVOKED,
    Attachment,
    Consistency,
    DiskManifest,
    Manifest,
    Subject,
    chunk_bytes_for,
    encode_manifest,
    manifest_name,
)
from trimtab_agent.backup.repository.packs import PREFIX as PACKS_PREFIX
from trimtab_agent.backup.repository.packs import PackBuilder
from trimtab_agent.backup.repository.repository import Repository
from trimtab_agent.backup.repository.sealing import HOLE, ID_BYTES, SALT_BYTES, Cipher, Content, Kind, Record, seal_object
from trimtab_agent.backup.repository.sessions import Session, SessionKind, new_session
from trimtab_protos.errors import AlreadyExists, Conflict, NotFound, TrimtabError, Unavailable

PACK_BYTES = 16 << 20
"""Of one pack, built in memory: one that grows and one on its way take 32 MiB, twice that on a bucket."""
WORKERS = 2
IN_FLIGHT_MAX = 16
ATTACHMENT_CHUNK_BYTES = 256 * 1024
_PAGE_BYTES = PAGE_CHUNKS * ID_BYTES


class RecordSink:
    """Takes records of one session, packs them and stores the packs. Thread-safe; one pack is on its way while the next grows."""

    def __init__(self, repository: Repository, session: Session, *, pack_bytes: int = PACK_BYTES) -> None:
        self._repository = repository
        self._session = session
        self._pack_bytes = pack_bytes
        self._cipher = Cipher(
            repository.keyring,
            repository.identifier,
            version=repository.keyring.newest_version,
            salt=os.urandom(SALT_BYTES),
            context="pack",
        )
        self._lock = threading.Lock()
        self._open: dict[bool, PackBuilder] = {}
        self._unstored: set[bytes] = set()
        self._count = 0
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._pending: Future[None] | None = None
        self._index_pieces: list[bytes] = []
        self._index_entries = 0
        self.stored_bytes = 0

    def put(self, kind: Kind, content: Content) -> bytes:
        """Return the id of the content, after storing it if no pack that stays has it."""
        id = self._repository.identifier.of(kind, content)
        with self._lock:
            if id in self._unstored:
                return id
            if self._repository.index.is_kept(id):
                return id
            self._unstored.add(id)
        self._add(self._cipher.seal(kind, id, content))
        return id

    def flush(self) -> None:
        """Store what is open and the index of all that was stored; all is durable when it returns."""
        with self._lock:
            for builder in list(self._open.values()):
                self._hand_over(builder)
            self._open.clear()
            self._wait()
        self._write_index()

    def close(self) -> None:
        self._storing.shutdown(wait=True, cancel_futures=True)

    def _add(self, record: Record) -> None:
        with self._lock:
            # Pages apart from chunks: marking reads all pages and no chunk.
            is_page = record.kind is Kind.PAGE
            builder = self._open.get(is_page)
            if builder is None:
                name = f"{PACKS_PREFIX}{self._session.id}-{self._count:06}"
                self._count += 1
                builder = self._open[is_page] = PackBuilder(name, self._cipher, self._repository.identifier)
            builder.add(record)
            self.stored_bytes += record.length
            if builder.length >= self._pack_bytes:
                del self._open[is_page]
                self._hand_over(builder)

    def _hand_over(self, builder: PackBuilder) -> None:
        self._wait()
        self._pending = self._storing.submit(self._store, builder)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _store(self, builder: PackBuilder) -> None:
        pack = IndexedPack(builder.name, builder.store(self._repository.blobs), builder.entries)
        self._repository.index.add_pack("", pack)
        self._unstored.difference_update([entry.id for entry in pack.entries])
        self._index_pieces.append(encode_index([pack]))
        self._index_entries += len(pack.entries)
        if self._index_entries >= ENTRIES_PER_FILE:
            self._write_index()

    def _write_index(self) -> None:
        if self._index_pieces:
            name = chunk_index.PREFIX + self._repository.new_name()
            self._repository.put_object(Kind.INDEX, name, b"".join(self._index_pieces))
            self._index_pieces, self._index_entries = [], 0


@dataclass(slots=True)
class _Failure:
    error: BaseException | None = None


class DiskWriter:
    """One disk of a backup. What is not put is as in the base, or a hole where there is none. For one thread."""

    def __init__(
        self,
        writer: "BackupWriter",
        name: str,
        size_bytes: int,
        *,
        base: DiskManifest | None,
        chunk_bytes: int | None,
        spool: Path | None,
    ) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.chunk_bytes = chunk_bytes or (base.chunk_bytes if base else chunk_bytes_for(size_bytes))
        if base is not None and (base.size_bytes > size_bytes or base.chunk_bytes != self.chunk_bytes):
            raise Conflict(
                "base-does-not-fit", f"the disk {name} became smaller since its last backup; read all of it", disk=name
            )
        self.read_bytes = 0
        self.stored_before = writer.sink.stored_bytes
        self._writer = writer
        self._base = base
        self._pages: dict[int, bytes] = dict(base.pages) if base else {}
        self._touched: set[int] = set()
        # Ids outside of memory: 128 MiB for each TiB of disk.
        self._ids = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115 - closed by finish or abort
        self._zeros = bytes(self.chunk_bytes)

    @property
    def chunk_count(self) -> int:
        return -(-self.size_bytes // self.chunk_bytes)

    def length_of(self, chunk: int) -> int:
        return min(self.chunk_bytes, self.size_bytes - chunk * self.chunk_bytes)

    def repairs(self) -> Sequence[int]:
        """Return the chunks that must be put although nothing has changed them: their stored form is damaged or about to go.

        Put the bytes that the disk has now: where they are those of the base, this repairs every backup that needs the chunk.
        """
        if self._base is None:
            return []
        wanted = set()
        last = self._base.chunk_count - 1
        if self._base.length_of(last) != self.length_of(last):
            wanted.add(last)
        if self._writer.repository.has_gaps:
            for number, page_id in self._base.pages.items():
                wanted.update(self._gaps_of(number, page_id))
        return sorted(wanted)

    def put(self, chunk: int, content: bytes | bytearray) -> None:
        """Take the content of one chunk; `content` must not change afterwards. Raises what an earlier put met."""
        if len(content) != self.length_of(chunk):
            raise ValueError(f"chunk {chunk} of {self.name} has {self.length_of(chunk)} bytes, not {len(content)}")
        self._touch(chunk // PAGE_CHUNKS)
        self.read_bytes += len(content)
        self._writer.submit(self, chunk, content)

    def put_holes(self, first: int, end: int) -> None:
        """Take chunks that read as zeros, without their bytes."""
        if self._base is None:
            return  # what is not put is a hole, and a disk of terabytes is mostly that
        for number in range(first // PAGE_CHUNKS, -(-end // PAGE_CHUNKS)):
            begin, after = max(first, number * PAGE_CHUNKS), min(end, (number + 1) * PAGE_CHUNKS)
            if number in self._pages or number in self._touched:
                self._touch(number)
                os.pwrite(self._ids.fileno(), HOLE * (after - begin), begin * ID_BYTES)

    def ingest(self, chunk: int, content: bytes | bytearray) -> None:
        """In a worker's thread: store the chunk and note its id."""
        is_hole = content == self._zeros[: len(content)]
        self._set(chunk, HOLE if is_hole else self._writer.sink.put(Kind.CHUNK, content))

    def finish(self) -> dict[int, bytes]:
        """Store the touched pages and return the table of all; every put has been waited for."""
        for number in sorted(self._touched):
            count = min(PAGE_CHUNKS, self.chunk_count - number * PAGE_CHUNKS)
            content = os.pread(self._ids.fileno(), count * ID_BYTES, number * _PAGE_BYTES).ljust(count * ID_BYTES, b"\0")
            if content.strip(b"\0"):
                self._pages[number] = self._writer.sink.put(Kind.PAGE, content)
            else:
                self._pages.pop(number, None)
        self._ids.close()
        return self._pages

    def close(self) -> None:
        self._ids.close()

    def _touch(self, page: int) -> None:
        if page in self._touched:
            return
        self._touched.add(page)
        if page in self._pages:
            os.pwrite(self._ids.fileno(), self._page_content(self._pages[page]), page * _PAGE_BYTES)

    def _page_content(self, id: bytes) -> bytes:
        return self._writer.repository.read(Kind.PAGE, id)

    def _set(self, chunk: int, id: bytes) -> None:
        os.pwrite(self._ids.fileno(), id, chunk * ID_BYTES)

    def _gaps_of(self, number: int, page_id: bytes) -> Sequence[int]:
        repository, first = self._writer.repository, number * PAGE_CHUNKS
        try:
            ids = repository.read_page(page_id)
        except TrimtabError as error:
            if not errors.is_damage(error):
                raise
            # Which chunks it named is lost: all of them are read again, and without it they would count as holes.
            self._pages.pop(number)
            return range(first, min(first + PAGE_CHUNKS, self.chunk_count))
        gaps = [first + at for at, id in enumerate(ids) if id != HOLE and not repository.index.is_kept(id)]
        if not repository.index.is_kept(page_id):
            self._touch(number)
        return gaps


class BackupWriter:
    """One backup that is being written. A context manager: left without `commit`, it is aborted."""

    def __init__(
        self,
        repository: Repository,
        session: Session,
        subject: Subject,
        backup_id: str,
        *,
        base: Manifest | None,
        spool: Path | None,
    ) -> None:
        self.repository = repository
        self.subject = subject
        self.backup_id = backup_id
        self.base = base
        self.sink = RecordSink(repository, session)
        self._session = session
        self._spool = spool
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="chunk")
        self._room = threading.BoundedSemaphore(IN_FLIGHT_MAX)
        self._failure = _Failure()
        self._disks: list[DiskWriter] = []
        self._attachments: list[Attachment] = []
        self._is_open = True

    def open_disk(
        self, name: str, size_bytes: int, *, base: DiskManifest | None = None, chunk_bytes: int | None = None
    ) -> DiskWriter:
        """Begin a disk; with `base` only what changed since needs to be put. Conflict where the base does not fit."""
        disk = DiskWriter(self, name, size_bytes, base=base, chunk_bytes=chunk_bytes, spool=self._spool)
        self._disks.append(disk)
        return disk

    def attach(self, name: str, content: bytes) -> None:
        """Take a small file of the vm."""
        pieces = [content[at : at + ATTACHMENT_CHUNK_BYTES] for at in range(0, len(content), ATTACHMENT_CHUNK_BYTES)]
        chunks = [self.sink.put(Kind.CHUNK, piece) for piece in pieces]
        self._attachments.append(Attachment(name, len(content), chunks))

    def submit(self, disk: DiskWriter, chunk: int, content: bytes | bytearray) -> None:
        self._session.renew()
        self._room.acquire()
        if self._failure.error is not None:
            self._room.release()
            raise self._failure.error
        self._workers.submit(self._ingest, disk, chunk, content)

    def commit(
        self,
        disks: Sequence[DiskManifest],
        *,
        created_ms: int,
        consistency: Consistency,
        notes: Mapping[str, str] | None = None,
    ) -> Manifest:
        """List the backup and return its manifest. `disks` come from `finish`.

        Conflict `backup-session-revoked` where prune took this session for dead, DeadlineExceeded `backup-commit-unknown`.
        """
        self.sink.flush()
        manifest = Manifest(
            backup_id=self.backup_id,
            subject=self.subject,
            created_ms=created_ms,
            consistency=consistency,
            disks=disks,
            attachments=self._attachments,
            base_id=self.base.backup_id if self.base else "",
            notes=dict(notes or {}),
        )
        self._list(manifest)
        self._is_open = False
        self._close()
        with contextlib.suppress(TrimtabError):  # a lease that stays goes silent and is ended by prune
            self._session.end()
        return manifest

    def finish(
        self,
        disk: DiskWriter,
        *,
        volume_id: str = "",
        generation: int = 0,
        checkpoint: str = "",
        full_reason: str = "",
        dirty_bytes: int = 0,
    ) -> DiskManifest:
        """Wait for the disk's chunks and return its part of the manifest. Raises what a put met."""
        self._drain()
        pages = disk.finish()
        return DiskManifest(
            name=disk.name,
            size_bytes=disk.size_bytes,
            chunk_bytes=disk.chunk_bytes,
            pages=pages,
            volume_id=volume_id,
            generation=generation,
            checkpoint=checkpoint,
            full_reason=full_reason,
            dirty_bytes=dirty_bytes,
            read_bytes=disk.read_bytes,
            stored_bytes=self.sink.stored_bytes - disk.stored_before,
        )

    def abort(self) -> None:
        """Give up; idempotent. What was stored is garbage for prune, or found again by the next backup."""
        if not self._is_open:
            return
        self._is_open = False
        self._close()
        with contextlib.suppress(TrimtabError):
            self.repository.store_damage()  # of the base, perhaps what ended this: the next attempt repairs it
        with contextlib.suppress(TrimtabError):
            self._session.end()

    def __enter__(self) -> "BackupWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()

    def _ingest(self, disk: DiskWriter, chunk: int, content: bytes | bytearray) -> None:
        try:
            if self._failure.error is None:
                disk.ingest(chunk, content)
        except BaseException as error:  # noqa: BLE001 - raised by the next put, in the thread that can act
            self._failure.error = error
        finally:
            self._room.release()

    def _drain(self) -> None:
        for _ in range(IN_FLIGHT_MAX):
            self._room.acquire()
        for _ in range(IN_FLIGHT_MAX):
            self._room.release()
        if self._failure.error is not None:
            raise self._failure.error

    def _list(self, manifest: Manifest) -> None:
        blobs, name = self.repository.blobs, manifest.name
        blob = seal_object(self.repository.keyring, self.repository.identifier, Kind.MANIFEST, name, encode_manifest(manifest))
        try:
            blobs.put_new(name, [blob])
        except AlreadyExists as error:
            found = blobs.get(name)
            if found == REVOKED:
                raise errors.session_revoked(self.backup_id) from error
            if found != blob:
                raise errors.backup_exists(self.backup_id) from error
        except Unavailable as error:
            # The answer may have been lost after the deed: look, and say so where looking fails too.
            try:
                is_listed = blobs.get(name) == blob
            except NotFound:
                is_listed = False
            except TrimtabError as second:
                raise errors.commit_unknown(self.backup_id, str(second)) from error
            if not is_listed:
                raise errors.commit_unknown(self.backup_id, str(error)) from error

    def _close(self) -> None:
        self._workers.shutdown(wait=True, cancel_futures=False)
        self.sink.close()
        for disk in self._disks:
            disk.close()


def begin_backup(
    repository: Repository, subject: Subject, backup_id: str, *, base_id: str | None = None, spool: Path | None = None
) -> BackupWriter:
    """Announce a writer and return it. `backup_id` must be new: each attempt has its own.

    NotFound where the base is gone, Conflict where it is damaged: begin again without one.
    PermissionDenied where the repository is not the vm's.
    """
    repository.require_writable()
    config = repository.config
    if subject.fleet_id != config.fleet_id:
        raise errors.of_another_fleet(found=config.fleet_id, given=subject.fleet_id)
    if config.project_id and subject.project_id != config.project_id:
        raise errors.of_another_project(found=config.project_id, given=subject.project_id)
    session = new_session(
        repository.blobs,
        repository.clock,
        SessionKind.WRITER,
        holder=repository.holder,
        manifest=manifest_name(subject.vm_id, backup_id),
    )
    session.announce()
    try:
        session.saw(repository.refresh())
        base = repository.manifest(subject.vm_id, base_id) if base_id else None
        return BackupWriter(repository, session, subject, backup_id, base=base, spool=spool)
    except BaseException:
        with contextlib.suppress(TrimtabError):
            session.end()
        raise
