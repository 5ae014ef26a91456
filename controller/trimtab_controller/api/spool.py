"""Uploads on disk: streamed to a `.partial` file, checked, synced, renamed; what is unfinished or expired is removed."""

import asyncio
import functools
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from io import RawIOBase
from pathlib import Path
from typing import TypeVar

from trimtab_controller.api.context import ApiContext
from trimtab_controller.clock import mint
from trimtab_controller.store import images
from trimtab_controller.store.images import Upload
from trimtab_protos.errors import InvalidRequest, Unavailable

T = TypeVar("T")

# Bytes gathered before a thread is asked to write them: a thread hop per network chunk would cost more than the write.
CHUNK_BYTES = 1 << 20
PARTIAL = ".partial"
# A client that sends nothing for this long holds room that others need.
IDLE_TIMEOUT_S = 60.0
# A file this old without a row belongs to a process that died: no upload takes that long.
ORPHAN_AGE_S = 48 * 3600


@dataclass(slots=True)
class _Writing:
    file: RawIOBase
    digest: "hashlib._Hash"
    size_bytes: int = 0


class Spool:
    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._directory = context.settings.uploads_dir
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="spool")
        # Announced and not yet in SQL.
        self._reserved_bytes = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def receive(self, chunks: AsyncIterator[bytes], *, project_id: str, size_bytes: int, sha256: str) -> Upload:
        """Store a body of exactly `size_bytes` and return its row, not yet inserted: `keep` does, `drop` undoes.

        Unavailable `spool-full`; InvalidRequest for another size or checksum. Nothing stays behind on any failure.
        """
        await self._check_room(size_bytes)
        upload_id = mint("up")
        unfinished = self._directory / f"{upload_id}{PARTIAL}"
        self._reserved_bytes += size_bytes
        try:
            digest = await self._write(unfinished, chunks, size_bytes)
            if sha256 and digest != sha256:
                raise InvalidRequest(
                    "checksum-mismatch", f"X-Content-SHA256: the bytes that came have {digest}", field="X-Content-SHA256"
                )
            await self._in_thread(lambda: _settle(unfinished, self._path(upload_id)))
        except OSError as error:
            await self._remove(unfinished)
            raise Unavailable("spool-full", "the controller cannot store the upload now; its disk is full or failing") from error
        except BaseException:  # a client that hung up is a CancelledError or a ClientDisconnect
            await asyncio.shield(self._remove(unfinished))
            raise
        finally:
            self._reserved_bytes -= size_bytes
        now = self._context.clock.now()
        return Upload(
            id=upload_id,
            project_id=project_id,
            gateway_address=self._context.settings.gateway_address,
            size_bytes=size_bytes,
            sha256=digest,
            expires_at=now + timedelta(seconds=self._context.settings.upload_ttl_s),
            created_at=now,
        )

    async def drop(self, upload_id: str) -> None:
        """Remove an upload whose row was not committed."""
        await self._remove(self._path(upload_id))

    async def sweep(self) -> None:
        """Remove expired uploads, rows and files, and files that nobody finished."""
        db, address = self._context.db, self._context.settings.gateway_address
        now = self._context.clock.now()
        expired = await db.read(lambda session: images.expired_uploads(session, address, now))
        if expired:
            await self._remove(*(self._path(one) for one in expired))
            await db.write(lambda session: images.delete_uploads(session, expired), durable=False)
        before_s = now.timestamp() - ORPHAN_AGE_S
        old = await self._in_thread(lambda: _older_than(self._directory, before_s))
        known = await db.read(lambda session: images.known_uploads(session, [path.stem for path in old])) if old else frozenset()
        orphans = [path for path in old if path.name not in known]
        await self._remove(*orphans)

    async def _check_room(self, size_bytes: int) -> None:
        settings = self._context.settings
        taken = await self._context.db.read(lambda session: images.spooled_bytes(session, settings.gateway_address))
        free = await self._in_thread(lambda: _free_bytes(self._directory))
        wanted = self._reserved_bytes + size_bytes
        if taken + wanted > settings.spool_max_bytes or wanted + settings.spool_keep_free_bytes > free:
            raise Unavailable(
                "spool-full",
                "the controller has no room for this upload now; imports that end and uploads that expire make some",
                free_bytes=max(0, min(settings.spool_max_bytes - taken, free - settings.spool_keep_free_bytes)),
            )

    async def _write(self, partial: Path, chunks: AsyncIterator[bytes], size_bytes: int) -> str:
        writing = await self._in_thread(lambda: _Writing(_create(partial), hashlib.sha256()))
        gathered: list[bytes] = []
        pending = 0
        try:
            async for chunk in _paced(chunks):
                gathered.append(chunk)
                pending += len(chunk)
                if writing.size_bytes + pending > size_bytes:
                    raise InvalidRequest("size-mismatch", "the body is longer than Content-Length", field="Content-Length")
                if pending >= CHUNK_BYTES:
                    await self._in_thread(functools.partial(_append, writing, b"".join(gathered)))
                    gathered, pending = [], 0
            await self._in_thread(lambda: _append(writing, b"".join(gathered)))
            if writing.size_bytes != size_bytes:
                raise InvalidRequest(
                    "size-mismatch", f"the body ended after {writing.size_bytes} of {size_bytes} bytes", field="Content-Length"
                )
            await self._in_thread(lambda: os.fsync(writing.file.fileno()))
        finally:
            writing.file.close()
        return writing.digest.hexdigest()

    async def _remove(self, *paths: Path) -> None:
        def remove() -> None:
            for path in paths:
                path.unlink(missing_ok=True)

        await self._in_thread(remove)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _path(self, upload_id: str) -> Path:
        return self._directory / upload_id


async def _paced(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the chunks. InvalidRequest where the next one does not come."""
    while True:
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise InvalidRequest("upload-stalled", f"the body stopped for {IDLE_TIMEOUT_S:.0f} s", field="body") from error
        yield chunk


def _create(path: Path) -> RawIOBase:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "wb", buffering=0)


def _append(writing: _Writing, block: bytes) -> None:
    view = memoryview(block)
    while view:
        written = writing.file.write(view)
        view = view[written:]
    writing.digest.update(block)
    writing.size_bytes += len(block)


def _settle(partial: Path, final: Path) -> None:
    """Give the file its name, durably."""
    partial.rename(final)
    directory = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _free_bytes(directory: Path) -> int:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return shutil.disk_usage(directory).free


def _older_than(directory: Path, before_s: float) -> list[Path]:
    if not directory.is_dir():
        return []
    return [path for path in directory.glob("up-*") if path.stat().st_mtime < before_s]
