"""From an export to the repository: only what is dirty and holds data is read, in order, and handed on as chunks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trimtab_agent.backup import extents
from trimtab_agent.backup.extents import ChunkRun
from trimtab_agent.backup.nbd import ALLOCATION, DIRTY, REQUEST_BYTES, ZERO, Extent
from trimtab_agent.backup.repository.writer import DiskWriter
from trimtab_agent.backup.source import DiskContent

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; may raise to cancel, may sleep to slow down."""


@dataclass(frozen=True, slots=True)
class Copied:
    dirty_bytes: int
    """Marked dirty; for a full the disk's size."""
    read_bytes: int
    hole_bytes: int
    repaired_bytes: int
    """Read although clean, since the repository's copy was damaged."""


def copy_disk(client: DiskContent, disk: DiskWriter, *, bitmap: str | None, on_progress: OnProgress) -> Copied:
    """Put into `disk` what changed by the dirty bitmap's context, or all of it where `bitmap` is None.

    The client was connected with `base:allocation` and, for an increment, the bitmap's context.
    """
    chunk_bytes, repairs = disk.chunk_bytes, disk.repairs()
    if bitmap is None:
        wanted = [(0, disk.chunk_count)]
        dirty_bytes = disk.size_bytes
    else:
        dirty = [extent for extent in client.extents(bitmap) if extent.flags & DIRTY]
        dirty_bytes = sum(extent.length for extent in dirty)
        wanted = list(
            extents.merged([*extents.touched(dirty, chunk_bytes, flag=DIRTY), *((chunk, chunk + 1) for chunk in repairs)])
        )
    holding = extents.with_data(_allocation_of(client, wanted, chunk_bytes), chunk_bytes, zero=ZERO)
    runs = list(extents.plan(wanted, holding))
    total = sum(_bytes_of(disk, run) for run in runs if not run.is_hole)
    done = 0
    for offset, content in client.read_pieces(_requests(disk, runs, client.request_max_bytes), chunk_bytes):
        disk.put(offset // chunk_bytes, content)
        done += len(content)
        on_progress(done, total)
    return Copied(dirty_bytes, done, sum(_bytes_of(disk, run) for run in runs if run.is_hole), len(repairs) * chunk_bytes)


def _allocation_of(client: DiskContent, wanted: Sequence[tuple[int, int]], chunk_bytes: int) -> Iterator[Extent]:
    """Ask only where it matters: the cost of an increment grows with the change."""
    for first, end in wanted:
        begin, after = first * chunk_bytes, min(end * chunk_bytes, client.size_bytes)
        yield from client.extents(ALLOCATION, offset=begin, length=after - begin)


def _requests(disk: DiskWriter, runs: Sequence[ChunkRun], request_max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges to read; holes are noted on the way."""
    step = max(1, min(REQUEST_BYTES, request_max_bytes) // disk.chunk_bytes)
    for run in runs:
        if run.is_hole:
            disk.put_holes(run.first, run.end)
            continue
        for first in range(run.first, run.end, step):
            last = min(first + step, run.end)
            begin = first * disk.chunk_bytes
            yield begin, min(last * disk.chunk_bytes, disk.size_bytes) - begin


def _bytes_of(disk: DiskWriter, run: ChunkRun) -> int:
    return min(run.end * disk.chunk_bytes, disk.size_bytes) - run.first * disk.chunk_bytes
