"""Which chunks of a disk a backup reads: those that are dirty, less those that read as zeros. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trimtab_agent.backup.nbd import Extent


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """Neighbouring chunks: first and count. A hole is known to be zeros without reading."""

    first: int
    count: int
    is_hole: bool

    @property
    def end(self) -> int:
        return self.first + self.count


def touched(extents: Iterable[Extent], chunk_bytes: int, *, flag: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the chunks that an extent with the flag touches; ascending, merged where they meet."""
    first = end = -1
    for extent in extents:
        if not extent.flags & flag:
            continue
        begin, after = extent.offset // chunk_bytes, -(-extent.end // chunk_bytes)
        if begin <= end:
            end = max(end, after)
            continue
        if end > first:
            yield first, end
        first, end = begin, after
    if end > first:
        yield first, end


def with_data(extents: Iterable[Extent], chunk_bytes: int, *, zero: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the chunks that hold anything but zeros, by the allocation of the export."""
    inverted = (Extent(extent.offset, extent.length, 0 if extent.flags & zero else 1) for extent in extents)
    return touched(inverted, chunk_bytes, flag=1)


def plan(wanted: Iterable[tuple[int, int]], data: Iterable[tuple[int, int]]) -> Iterator[ChunkRun]:
    """Cut the wanted chunks into those to read and those that are holes; both inputs ascend."""
    holding = iter(data)
    current = next(holding, None)
    for first, end in wanted:
        at = first
        while at < end:
            while current is not None and current[1] <= at:
                current = next(holding, None)
            if current is None or current[0] >= end:
                yield ChunkRun(at, end - at, is_hole=True)
                break
            if current[0] > at:
                yield ChunkRun(at, current[0] - at, is_hole=True)
                at = current[0]
            until = min(end, current[1])
            yield ChunkRun(at, until - at, is_hole=False)
            at = until


def merged(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Merge runs that overlap or touch, in ascending order."""
    first = end = -1
    for begin, after in sorted(runs):
        if begin <= end:
            end = max(end, after)
            continue
        if end > first:
            yield first, end
        first, end = begin, after
    if end > first:
        yield first, end
