"""A disk of a backup as something to read from at random, fast: chunks are opened once, by several threads, and ahead of who reads on.

Whoever needs a chunk that another thread opens just now waits for that one instead of opening it again. What was asked for in order is
fetched ahead, neighbours in a pack in one request. A chunk that cannot be had is an error for whoever asked, and is tried again by the
next: nothing wrong is ever handed out, nothing failed is kept.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.backup.repository.sealing import HOLE
from trimtab_protos.errors import TrimtabError

CACHE_BYTES = 48 << 20
AHEAD_CHUNKS = 16
"""4 MiB at the usual chunk size: one request to a bucket."""
AHEAD_BATCHES = 3
"""At most so many requests ahead at once: the memory of what is on its way is bounded by it."""


class DiskContent:
    """Use as a context manager. Thread-safe."""

    def __init__(self, reader: DiskReader, *, ahead_chunks: int = AHEAD_CHUNKS, cache_bytes: int = CACHE_BYTES) -> None:
        """`ahead_chunks` of 0 fetches nothing ahead."""
        self.size_bytes = reader.manifest.size_bytes
        self.chunk_bytes = reader.manifest.chunk_bytes
        self._reader = reader
        self._ahead_chunks = ahead_chunks
        self._cache_chunks = max(2 * AHEAD_BATCHES * ahead_chunks, cache_bytes // self.chunk_bytes, 2)
        self._ahead = ThreadPoolExecutor(AHEAD_BATCHES - 1, thread_name_prefix="ahead")
        self._room = threading.BoundedSemaphore(AHEAD_BATCHES)
        self._lock = threading.Lock()
        self._chunks: OrderedDict[bytes, Future[bytes]] = OrderedDict()
        self._next = 0
        """The chunk after the last that was read."""
        self._fetched_to = 0

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, memoryview | None]]:
        """Yield offset, length and bytes of a range within the disk, in order; None where it is all zeros."""
        end = offset + length
        while offset < end:
            chunk, at = divmod(offset, self.chunk_bytes)
            count = min(end - offset, self.chunk_bytes - at)
            id = self._reader.id_of(chunk)
            self._look_ahead(chunk)
            yield offset, count, None if id == HOLE else memoryview(self._content(id))[at : at + count]
            offset += count

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(bytes(count) if piece is None else piece for _, count, piece in self.pieces(offset, length))

    def is_hole(self, chunk: int) -> bool:
        return self._reader.id_of(chunk) == HOLE

    def extents(self, offset: int, length: int, *, limit: int) -> Iterator[tuple[int, bool]]:
        """Yield length and whether it is zeros, neighbours of one kind as one, at most `limit` of them."""
        end, run, was_hole, given = offset + length, 0, False, 0
        while offset < end:
            chunk, at = divmod(offset, self.chunk_bytes)
            count, is_hole = min(end - offset, self.chunk_bytes - at), self.is_hole(chunk)
            if run and is_hole is not was_hole:
                yield run, was_hole
                run, given = 0, given + 1
                if given == limit:
                    return
            run, was_hole, offset = run + count, is_hole, offset + count
        if run:
            yield run, was_hole

    def close(self) -> None:
        self._ahead.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "DiskContent":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _content(self, id: bytes) -> bytes:
        chunk, is_ours = self._claim(id)
        if is_ours:
            try:
                chunk.set_result(self._reader.content_of(id))
            except BaseException as error:
                self._give_up(id, chunk, error)
                raise
            return chunk.result()
        try:
            return chunk.result()
        except TrimtabError:
            return self._reader.content_of(id)  # whoever fetched it ahead may have failed at another

    def _claim(self, id: bytes) -> tuple[Future[bytes], bool]:
        """Return the chunk, and whether it is the caller's to open."""
        with self._lock:
            known = self._chunks.get(id)
            if known is not None:
                self._chunks.move_to_end(id)
                return known, False
            claimed: Future[bytes] = Future()
            self._chunks[id] = claimed
            if len(self._chunks) > self._cache_chunks:
                self._chunks.popitem(last=False)
            return claimed, True

    def _give_up(self, id: bytes, chunk: "Future[bytes]", error: BaseException) -> None:
        with self._lock:
            if self._chunks.get(id) is chunk:
                del self._chunks[id]
        chunk.set_exception(error)

    def _look_ahead(self, chunk: int) -> None:
        """Fetch on where whoever reads goes forward."""
        if not self._ahead_chunks:
            return
        with self._lock:
            is_onward = self._next - 2 <= chunk <= self._next + self._ahead_chunks
            self._next = chunk + 1
            if not is_onward:
                self._fetched_to = chunk + 1
                return
            if self._fetched_to > chunk + (AHEAD_BATCHES - 1) * self._ahead_chunks or not self._room.acquire(blocking=False):
                return
            begin = max(self._fetched_to, chunk + 1)
            self._fetched_to = begin + self._ahead_chunks
        try:
            self._ahead.submit(self._fetch, begin)
        except RuntimeError:  # closed meanwhile
            self._room.release()

    def _fetch(self, begin: int) -> None:
        """Open the chunks of a batch that nobody has; what fails is left to who asks for it."""
        claimed: dict[bytes, Future[bytes]] = {}
        try:
            for chunk in range(begin, min(begin + self._ahead_chunks, -(-self.size_bytes // self.chunk_bytes))):
                id = self._reader.id_of(chunk)
                if id == HOLE:
                    continue
                future, is_ours = self._claim(id)
                if is_ours:
                    claimed[id] = future
            if claimed:
                self._reader.fetch(
                    list(claimed),
                    lambda id, content: claimed.pop(id).set_result(content),
                    lambda id, error: self._give_up(id, claimed.pop(id), error),
                )
        except BaseException as error:
            for id, future in list(claimed.items()):
                self._give_up(id, future, error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._room.release()
