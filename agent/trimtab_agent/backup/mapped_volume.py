"""A volume as QEMU understands its file, read without QEMU in between: `qemu-img` says what lies where, the bytes come from there.

What says where things lie is another program than the one that put them there, so that reading back proves the tables too.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from trimtab_agent.backup.nbd import HOLE, REQUEST_BYTES, ZERO, Extent
from trimtab_protos.errors import Conflict, Internal


class MappedVolume:
    """The `DiskContent` of a volume that nobody writes to, walked once, in ascending order. A context manager.

    Conflict `volume-inconsistent` where QEMU finds fault with the file's tables.
    """

    def __init__(self, file: Path, *, format: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.request_max_bytes = REQUEST_BYTES
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._map: subprocess.Popen[str] | None = None
        self._runs: list[tuple[Extent, int]] = []
        try:
            if format == "qcow2":
                _check(file)
            self._map = subprocess.Popen(
                ["qemu-img", "map", "--output=json", "-f", format, "--", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._told = self._read_map(self._map)
        except BaseException:
            self.close()
            raise

    def extents(self, context: str, *, offset: int = 0, length: int | None = None) -> Iterator[Extent]:  # noqa: ARG002 - one context
        """Yield the extents of a range, which begins where the last one ended."""
        end = self.size_bytes if length is None else offset + length
        left, at = (self._runs[-1:] if self._runs and self._runs[-1][0].end > offset else []), offset
        self._runs = left
        while at < end:
            if left:
                left = []
            else:
                told = next(self._told, None)
                if told is None or told[0].offset != at:
                    raise Internal("volume-not-mapped", f"qemu-img said nothing of the volume from byte {at} on")
                self._runs.append(told)
            extent = self._runs[-1][0]
            yield Extent(at, min(extent.end, end) - at, extent.flags)
            at = min(extent.end, end)

    def read_pieces(self, ranges: Iterable[tuple[int, int]], piece_bytes: int) -> Iterator[tuple[int, bytearray]]:
        """Yield ranges of what `extents` was last asked for, in pieces; what lies nowhere is zeros."""
        runs = iter(self._runs)
        run, lies_at = next(runs)
        for offset, length in ranges:
            for begin in range(offset, offset + length, piece_bytes):
                piece = bytearray(min(piece_bytes, offset + length - begin))
                at, view = begin, memoryview(piece)
                while view:
                    while run.end <= at:
                        run, lies_at = next(runs)
                    count = min(len(view), run.end - at)
                    if not run.flags & ZERO:
                        self._fill(view[:count], lies_at + at - run.offset)
                    at, view = at + count, view[count:]
                yield begin, piece

    def close(self) -> None:
        os.close(self._descriptor)
        if self._map is not None:
            with contextlib.suppress(ProcessLookupError):
                self._map.kill()
            self._map.communicate()

    def __enter__(self) -> "MappedVolume":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fill(self, view: memoryview, at: int) -> None:
        while view:
            count = os.preadv(self._descriptor, [view], at)
            if not count:
                return  # beyond the end of the file, which reads as zeros
            at, view = at + count, view[count:]

    @staticmethod
    def _read_map(process: "subprocess.Popen[str]") -> Iterator[tuple[Extent, int]]:
        """Yield what lies where, line by line: of a large disk there may be millions."""
        assert process.stdout is not None
        for line in process.stdout:
            text = line.strip().lstrip("[").rstrip("],")
            if not text:
                continue
            told = json.loads(text)
            is_hole = bool(told["zero"]) or not told.get("present", True)
            if not is_hole and "offset" not in told:
                raise Internal("volume-not-mapped", f"qemu-img does not say where byte {told['start']} of the volume lies")
            yield Extent(told["start"], told["length"], HOLE | ZERO if is_hole else 0), int(told.get("offset", -1))


def _check(file: Path) -> None:
    checked = subprocess.run(
        ["qemu-img", "check", "-q", "-f", "qcow2", "--", str(file)],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if checked.returncode:
        detail = (checked.stdout + checked.stderr)[-400:]
        if "lock" in detail:
            raise Conflict("image-locked", "the volume is in use by another QEMU, on this host or on another", detail=detail)
        raise Conflict("volume-inconsistent", f"QEMU finds fault with the restored volume: {detail}")
