"""Reading a backup: any range at random for an export, or whole disks in the order that storage likes.

A reader's lease keeps prune from removing what it reads. Every chunk is checked against its id: a damaged one is an error, never
wrong bytes.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType

from trimtab_agent.backup.repository.fetching import OnContent, OnDamage, fetch, fetch_batches
from trimtab_agent.backup.repository.manifests import PAGE_CHUNKS, Attachment, DiskManifest, Manifest
from trimtab_agent.backup.repository.repository import Repository
from trimtab_agent.backup.repository.sealing import HOLE, Kind
from trimtab_agent.backup.repository.sessions import Session, SessionKind, new_session
from trimtab_protos.errors import NotFound, TrimtabError

WINDOW_CHUNKS = 128
"""Read together, 32 MiB at the usual chunk size: enough to find neighbours in packs, little enough for memory."""
_PAGES_KEPT = 16
_CHUNKS_KEPT = 32


class DiskReader:
    """One disk of a backup. Thread-safe."""

    def __init__(self, repository: Repository, session: Session | None, disk: DiskManifest) -> None:
        self.manifest = disk
        self._repository = repository
        self._session = session
        self._lock = threading.Lock()
        self._pages: OrderedDict[int, Sequence[bytes]] = OrderedDict()
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()
        self._zeros = bytes(disk.chunk_bytes)

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range within the disk. Conflict where a chunk of it is damaged."""
        size, chunk_bytes = self.manifest.size_bytes, self.manifest.chunk_bytes
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"{offset}+{length} is outside of a disk of {size} bytes")
        pieces = []
        end = offset + length
        while offset < end:
            chunk, at = divmod(offset, chunk_bytes)
            count = min(end - offset, chunk_bytes - at)
            id = self.id_of(chunk)
            pieces.append(bytes(count) if id == HOLE else self._content(id)[at : at + count])
            offset += count
        return b"".join(pieces)

    def id_of(self, chunk: int) -> bytes:
        """Return the id of a chunk, `HOLE` where it is all zeros."""
        number, at = divmod(chunk, PAGE_CHUNKS)
        if number not in self.manifest.pages:
            return HOLE
        return self._page(number)[at]

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and id of every chunk that is not a hole, in order."""
        for number in sorted(self.manifest.pages):
            for at, id in enumerate(self._page(number)):
                if id != HOLE:
                    yield number * PAGE_CHUNKS + at, id

    def copy_to(self, write: Callable[[int, bytes], None], *, place: Callable[[int, int], int] | None = None) -> int:
        """Write every chunk that is not a hole through `write(offset, bytes)`; return how many bytes.

        `write` is called from several threads in no order; the target must read as zeros before. Where a chunk of the disk goes is what
        `place(offset, length)` returns, called in order in the caller's thread; by default to the same offset.
        """
        written = 0

        def batches() -> Iterator[tuple[Sequence[bytes], OnContent]]:
            nonlocal written
            for window in self._windows():
                targets: dict[bytes, list[int]] = {}
                for chunk, id in window:
                    offset, length = chunk * self.manifest.chunk_bytes, self.manifest.length_of(chunk)
                    targets.setdefault(id, []).append(offset if place is None else place(offset, length))
                    written += length

                def put(id: bytes, content: bytes, targets: Mapping[bytes, Sequence[int]] = targets) -> None:
                    for at in targets[id]:
                        write(at, content)

                yield list(targets), put

        fetch_batches(self._repository, Kind.CHUNK, batches())
        return written

    def content_of(self, id: bytes) -> bytes:
        """Return one chunk, kept nowhere. Conflict where it is damaged."""
        self._renew()
        return self._repository.read(Kind.CHUNK, id)

    def fetch(self, ids: Sequence[bytes], on_content: Callable[[bytes, bytes], None], on_damage: OnDamage) -> None:
        """Give each chunk to `on_content`, neighbours read together, in the caller's thread and in no order."""
        self._renew()
        fetch(self._repository, Kind.CHUNK, ids, on_content, on_damage=on_damage, workers=1)

    def scan(self, on_damage: OnDamage) -> int:
        """Read and check every chunk; return how many bytes. Damage goes to `on_damage`."""
        scanned = 0

        def batches() -> Iterator[tuple[Sequence[bytes], OnContent]]:
            nonlocal scanned
            for window in self._windows():
                scanned += sum(self.manifest.length_of(chunk) for chunk, _ in window)
                yield [id for _, id in window], lambda _id, _content: None

        fetch_batches(self._repository, Kind.CHUNK, batches(), on_damage=on_damage)
        return scanned

    def is_content(self, chunk: int, content: bytes | bytearray) -> bool:
        """Tell whether a chunk of a restored disk is what was backed up."""
        id = self.id_of(chunk)
        if id == HOLE:
            return content == (self._zeros if len(content) == len(self._zeros) else bytes(len(content)))
        return self._repository.identifier.of(Kind.CHUNK, content) == id

    def first_content(self, first: int, end: int) -> int | None:
        """Return the first chunk of [first, end) that is not a hole. Costs nothing where whole pages are."""
        for number in range(first // PAGE_CHUNKS, -(-end // PAGE_CHUNKS)):
            if number not in self.manifest.pages:
                continue
            begin = number * PAGE_CHUNKS
            for chunk in range(max(first, begin), min(end, begin + PAGE_CHUNKS)):
                if self.id_of(chunk) != HOLE:
                    return chunk
        return None

    def _windows(self) -> Iterator[list[tuple[int, bytes]]]:
        window: list[tuple[int, bytes]] = []
        for found in self.chunks():
            window.append(found)
            if len(window) == WINDOW_CHUNKS:
                self._renew()
                yield window
                window = []
        if window:
            yield window

    def _renew(self) -> None:
        if self._session is not None:
            self._session.renew()

    def _page(self, number: int) -> Sequence[bytes]:
        with self._lock:
            known = self._pages.get(number)
        if known is not None:
            return known
        page = self._repository.read_page(self.manifest.pages[number])
        with self._lock:
            self._pages[number] = page
            if len(self._pages) > _PAGES_KEPT:
                self._pages.popitem(last=False)
        return page

    def _content(self, id: bytes) -> bytes:
        with self._lock:
            known = self._chunks.get(id)
            if known is not None:
                self._chunks.move_to_end(id)
                return known
        self._renew()
        content = self._repository.read(Kind.CHUNK, id)
        with self._lock:
            self._chunks[id] = content
            if len(self._chunks) > _CHUNKS_KEPT:
                self._chunks.popitem(last=False)
        return content


class BackupReader:
    """An opened backup. A context manager: leaving it ends the lease and makes known what was found damaged."""

    def __init__(self, repository: Repository, session: Session | None, manifest: Manifest) -> None:
        self.manifest = manifest
        self._repository = repository
        self._session = session

    def disk(self, name: str) -> DiskReader:
        found = self.manifest.disk(name)
        if found is None:
            names = ", ".join(disk.name for disk in self.manifest.disks)
            raise NotFound("backup-disk-not-found", f"the backup has no disk {name}; it has {names}", disk=name)
        return DiskReader(self._repository, self._session, found)

    def attachment(self, name: str) -> bytes:
        """Return a small file of the vm."""
        file = next((file for file in self.manifest.attachments if file.name == name), None)
        if file is None:
            raise NotFound("backup-file-not-found", f"the backup has no {name}", file=name)
        return self.content_of(file)

    def content_of(self, file: Attachment) -> bytes:
        return b"".join(self._repository.read(Kind.CHUNK, id) for id in file.chunks)

    def renew(self) -> None:
        """Show that the reader lives; to be called every few minutes where nothing may be read for long."""
        if self._session is not None:
            with contextlib.suppress(TrimtabError):  # tried again, long before silence counts as an end
                self._session.renew()

    def close(self) -> None:
        with contextlib.suppress(TrimtabError):  # what was read is whole; the damage is found again
            self._repository.store_damage()
        if self._session is not None:
            with contextlib.suppress(TrimtabError):
                self._session.end()

    def __enter__(self) -> "BackupReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_backup(repository: Repository, vm_id: str, backup_id: str) -> BackupReader:
    """Return a reader under a lease. A repository that was opened read-only is read without one: nothing may be written to it.

    NotFound where no such backup is listed, Conflict where its manifest is damaged.
    """
    if repository.is_read_only:
        repository.refresh()
        return BackupReader(repository, None, repository.manifest(vm_id, backup_id))
    session = new_session(repository.blobs, repository.clock, SessionKind.READER, holder=repository.holder)
    session.announce()
    try:
        session.saw(repository.refresh())
        return BackupReader(repository, session, repository.manifest(vm_id, backup_id))
    except BaseException:
        with contextlib.suppress(TrimtabError):
            session.end()
        raise
