"""Serial logs: bounded whoever writes how fast, readable by offsets that keep their meaning when the log is cut.

A log is what a guest wrote since its domain was defined here; an offset counts from that beginning. Two things cut it: virtlogd
renames it at its own limit (`log`, `log.0`, `log.1`, ...) where libvirt is set up so, and `bound` here, which keeps the newest half.
The offset of the live file's first byte is kept beside the log, with the inode it was counted for, so that a rename, a cut or a
restart of the agent is recognised. A read from what is gone is answered with the oldest bytes that are left.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock

from trimtab_agent.hypervisor.kvm.identifiers import check_id, check_range, domain_name, vm_id_of
from trimtab_protos.errors import NotFound

MAX_READ_BYTES = 1 << 20
DEFAULT_MAX_BYTES = 1 << 20
_SMALLEST_CAP_BYTES, _LARGEST_CAP_BYTES = 4096, 1 << 30
_LOG_SUFFIX, _POSITION_SUFFIX = ".serial.log", ".serial.json"
_MAX_BACKUPS = 16


@dataclass(frozen=True, slots=True)
class _Position:
    """What is known of one log."""

    inode: int = 0
    base: int = 0
    """Offset of the first byte of the live file."""
    length: int = 0
    """Length of the live file when last looked at."""
    max_bytes: int = DEFAULT_MAX_BYTES


@dataclass(frozen=True, slots=True)
class _Segment:
    start: int
    path: Path
    length: int


class ConsoleLogs:
    """Serial logs of this host's domains. Thread-safe."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._lock = Lock()

    def path_of(self, vm_id: str) -> str:
        return str(self._log_dir / f"{domain_name(vm_id)}{_LOG_SUFFIX}")

    def prepare(self, vm_id: str, *, max_bytes: int) -> None:
        """Remember the cap of a vm's log; from then on it can be read."""
        cap = check_range(
            max_bytes or DEFAULT_MAX_BYTES, "serial_log_max_bytes", low=_SMALLEST_CAP_BYTES, high=_LARGEST_CAP_BYTES
        )
        self._log_dir.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._save(vm_id, replace(self._settle(vm_id) or _Position(), max_bytes=cap))

    def read(self, vm_id: str, offset: int, max_bytes: int) -> tuple[bytes, int]:
        """Return bytes from `offset` on and the next offset. See `Hypervisor.read_console`."""
        check_id(vm_id, "vm_id")
        check_range(max_bytes, "max_bytes", low=1, high=MAX_READ_BYTES)
        with self._lock:
            position = self._settle(vm_id)
            if position is None:
                raise NotFound("console-not-found", f"this host keeps no serial log of {vm_id}", vm_id=vm_id)
            segments = self._segments(vm_id, position)
            end = position.base + position.length
            start = max(offset if offset >= 0 else end + offset, segments[0].start if segments else end)
            content = b"".join(_pieces(segments, start, max_bytes))
        return content, min(start, end) + len(content)

    def bound(self, vm_id: str) -> None:
        """Cut the log when it has grown over its cap; called again and again while the host runs guests."""
        with self._lock:
            position = self._settle(vm_id)
            if position is None:
                return
            segments = self._segments(vm_id, position)
            total = sum(segment.length for segment in segments)
            for oldest in segments[:-1]:
                if total <= position.max_bytes:
                    break
                oldest.path.unlink(missing_ok=True)
                total -= oldest.length
            if total > position.max_bytes:
                self._cut(vm_id, position)

    def remove(self, vm_id: str) -> None:
        """Remove the log and what is known of it."""
        with self._lock:
            for path in (Path(self.path_of(vm_id)), *self._backups(vm_id), self._position_path(vm_id)):
                path.unlink(missing_ok=True)

    def known(self) -> tuple[str, ...]:
        """Return the vms whose logs are kept here."""
        names = [path.name.removesuffix(_POSITION_SUFFIX) for path in self._log_dir.glob(f"*{_POSITION_SUFFIX}")]
        return tuple(vm_id for vm_id in map(vm_id_of, names) if vm_id)

    def _position_path(self, vm_id: str) -> Path:
        return self._log_dir / f"{domain_name(vm_id)}{_POSITION_SUFFIX}"

    def _backups(self, vm_id: str) -> list[Path]:
        """Return the renamed logs, newest first."""
        paths = [Path(f"{self.path_of(vm_id)}.{number}") for number in range(_MAX_BACKUPS)]
        return [path for path in paths if path.is_file()]

    def _segments(self, vm_id: str, position: _Position) -> list[_Segment]:
        """Return what is left of the log, oldest first; the last one is the live file."""
        segments, start = [_Segment(position.base, Path(self.path_of(vm_id)), position.length)], position.base
        for backup in self._backups(vm_id):
            length = backup.stat().st_size
            start -= length
            segments.insert(0, _Segment(start, backup, length))
        return segments if position.inode else segments[:-1]

    def _settle(self, vm_id: str) -> _Position | None:
        """Return where the log is now, having recognised what happened to it; None where no domain has one here."""
        try:
            known = _Position(**json.loads(self._position_path(vm_id).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            # Torn by a power cut. Counting begins anew, which is better than a log that is never bounded again.
            known = _Position()
        try:
            live = os.stat(self.path_of(vm_id), follow_symlinks=False)
        except FileNotFoundError:
            return known
        position = replace(known, inode=live.st_ino, length=live.st_size, base=self._base(vm_id, known, live))
        if position != known:
            self._save(vm_id, position)
        return position

    def _base(self, vm_id: str, known: _Position, live: os.stat_result) -> int:
        if known.inode == live.st_ino:
            was_cut_by_somebody = live.st_size < known.length
            return known.base + (known.length if was_cut_by_somebody else 0)
        renamed_bytes = 0
        for backup in self._backups(vm_id):
            found = backup.stat()
            renamed_bytes += found.st_size
            if found.st_ino == known.inode:
                return known.base + renamed_bytes
        # Renamed so often that the file we knew is gone: its end is a guess, and offsets still only grow.
        return known.base + known.length + renamed_bytes

    def _cut(self, vm_id: str, position: _Position) -> None:
        """Keep the newest half beside the log and empty the log under its writer, which appends."""
        live = Path(self.path_of(vm_id))
        kept = Path(f"{live}.0")
        with live.open("r+b") as file:
            file.seek(max(0, position.length - position.max_bytes // 2))
            kept.write_bytes(file.read(position.max_bytes // 2))
            kept.chmod(0o600)
            # What the guest wrote since is lost here and counted: nothing can both copy and cut at one instant.
            length = os.fstat(file.fileno()).st_size
            file.truncate(0)
        self._save(vm_id, replace(position, base=position.base + length, length=0))

    def _save(self, vm_id: str, position: _Position) -> None:
        path = self._position_path(vm_id)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(position)))
        temporary.replace(path)


def _pieces(segments: list[_Segment], start: int, max_bytes: int) -> Iterator[bytes]:
    for segment in segments:
        within = start - segment.start
        if max_bytes <= 0 or not 0 <= within < segment.length:
            continue
        with contextlib.suppress(FileNotFoundError):  # renamed this instant; the next read finds it
            descriptor = os.open(segment.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                piece = os.pread(descriptor, min(max_bytes, segment.length - within), within)
            finally:
                os.close(descriptor)
            yield piece
            start, max_bytes = start + len(piece), max_bytes - len(piece)
