"""The room for what guests overwrite while they are backed up, watched so that the backup ends before it is gone.

QEMU puts the old content aside before the guest's write goes on. Where there is no room for it QEMU (7.2, tried) fails the guest's write
and not the backup, which pauses the guest until somebody sees to it. So one backup gets half of what is free when it begins, leaves a
quarter free, at most a GiB, and is ended early: as much as was written between two looks may come before the end takes effect.

    begin ── look ── look ── too little is left: end the job ── a guest that was faster than the looks is let go on ── NoCapacity

A guest that is faster is paused for as long as that takes; its write is repeated once the job is gone, so that nothing of it is lost.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from trimtab_agent.hypervisor.kvm import free_space, os_errors
from trimtab_protos.errors import NoCapacity, TrimtabError

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.2
_NEEDED_BYTES = 8 << 20
"""Below it no backup begins: half of it is a moment of writing."""
_LOOKS_AHEAD = 2
_SETTLE_S = 30.0
_SETTLE_EVERY_S = 0.05
"""A job is gone some time after libvirt was asked to end it, and a guest that stands still waits for that."""
_STANDS_STILL = "QEMU paused the guest on an error of writing, as it does where there is no room"


@dataclass(frozen=True, slots=True)
class Room:
    """One file system, and the files on it that one backup's scratch goes to."""

    folder: Path
    files: tuple[Path, ...]
    free_bytes: int
    """When the backup began."""

    @property
    def cap_bytes(self) -> int:
        """What the files may take in all."""
        return self.free_bytes // 2

    @property
    def kept_free_bytes(self) -> int:
        """What is left to others: disks grow on the same file system."""
        return free_space.kept_free_bytes(self.free_bytes)

    def look(self) -> "Usage":
        return Usage(sum(_allocated(file) for file in self.files), free_space.free_bytes(self.folder))


@dataclass(frozen=True, slots=True)
class Usage:
    taken_bytes: int
    free_bytes: int


def why_end(room: Room, before: Usage, now: Usage) -> str:
    """Return why the backup is to end, "" where it may go on. Pure."""
    ahead_bytes = _LOOKS_AHEAD * max(0, now.taken_bytes - before.taken_bytes)
    if now.taken_bytes + ahead_bytes > room.cap_bytes:
        return f"{_mib(now.taken_bytes)} of at most {_mib(room.cap_bytes)} are taken in {room.folder}"
    if now.free_bytes - ahead_bytes < room.kept_free_bytes:
        return f"{_mib(now.free_bytes)} are left in {room.folder}, and {_mib(room.kept_free_bytes)} are kept for others"
    return ""


def rooms_of(files: Iterable[str]) -> Sequence[Room]:
    """Return the file systems of these files, as they are now. NoCapacity `scratch-full` where one has too little to begin with."""
    found: dict[int, list[Path]] = {}
    try:
        for file in map(Path, files):
            found.setdefault(file.parent.stat().st_dev, []).append(file)
        rooms = [Room(paths[0].parent, tuple(paths), free_space.free_bytes(paths[0].parent)) for paths in found.values()]
    except OSError as error:
        raise os_errors.from_os(error, doing="look for room for what the guest overwrites") from error
    for room in rooms:
        if room.free_bytes < _NEEDED_BYTES:
            raise _full(
                f"{_mib(room.free_bytes)} are left in {room.folder}, and none begins with less than {_mib(_NEEDED_BYTES)}"
            )
    return rooms


@contextlib.contextmanager
def watched(
    rooms: Sequence[Room], *, stood_still: bool, stands_still: Callable[[], bool], settle: Callable[[], bool]
) -> Iterator[None]:
    """Look after the room during the block; what breaks off because the job was ended leaves it as NoCapacity `scratch-full`.

    `stands_still` tells whether an error has paused the guest, and `stood_still` whether one had before the job began, which is none
    of its doing; `settle` ends the job, or lets such a guest go on once the job is gone,
    and is called until it tells that both are so. Either may raise a TrimtabError, and is asked again.
    """
    if not rooms:
        yield
        return
    watch = _Watch(rooms, stood_still, stands_still, settle)
    watch.thread.start()
    try:
        yield
    except TrimtabError as error:
        watch.stop()
        if watch.why:
            raise _full(watch.why) from error
        raise
    finally:
        watch.stop()


class _Watch:
    def __init__(
        self, rooms: Sequence[Room], stood_still: bool, stands_still: Callable[[], bool], settle: Callable[[], bool]
    ) -> None:
        self._seen = {room: room.look() for room in rooms}
        self._stands_still = stands_still
        self._settle = settle
        self._done = threading.Event()
        self._stood_still = stood_still
        self.thread = threading.Thread(target=self._run, name="scratch", daemon=True)
        self.why = ""
        """Set before the job is ended: whoever reads from it finds it here when that breaks off."""

    def stop(self) -> None:
        self._done.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.why and not self._done.wait(LOOK_EVERY_S):
            try:
                self.why = self._look()
            except (TrimtabError, OSError) as error:
                log.info("the room of a backup could not be looked at", error=str(error))
        deadline_s = time.monotonic() + _SETTLE_S
        while self.why and time.monotonic() < deadline_s:
            try:
                if self._settle():
                    return
            except TrimtabError as error:
                log.info("a backup without room is ended once more", error=error.message)
            time.sleep(_SETTLE_EVERY_S)  # nobody tells when a job is gone
        if self.why:
            # The mark of the job stays with whoever finds it (`pull_jobs`); a guest that stands still is shown as paused by an error.
            log.warning("a backup without room could not be ended in time", why=self.why)

    def _look(self) -> str:
        for room, before in self._seen.items():
            now = self._seen[room] = room.look()
            if why := why_end(room, before, now):
                return why
        stood_still, self._stood_still = self._stood_still, self._stands_still()
        return _STANDS_STILL if self._stood_still and not stood_still else ""


def _full(why: str) -> NoCapacity:
    return NoCapacity(
        "scratch-full",
        f"no room for what the guest overwrites during its backup: {why}; nothing was backed up, and the guest goes on. Make room "
        "there, move the disk to a pool with more (trimtab volume move), or back it up while it writes less",
    )


def _allocated(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
