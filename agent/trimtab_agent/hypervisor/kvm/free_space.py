"""What is left to others on a file system that one job writes to: the disks of guests grow there, and one without room is paused.

The agent is not told a pool's reserve, which is placement's; this is the same for every job that takes what nobody has claimed.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_KEPT_FREE_MAX_BYTES = 1 << 30


def free_bytes(folder: Path | int) -> int:
    """Return what may be written to the file system of a folder, or of an open one."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def kept_free_bytes(free_before_bytes: int) -> int:
    """Return what a job leaves of what was free when it began: a quarter, at most a GiB. Pure."""
    return min(free_before_bytes // 4, _KEPT_FREE_MAX_BYTES)


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """The file system of an open directory, for one job that fills it."""

    directory: int
    free_before_bytes: int
    """When the job began."""

    @classmethod
    def of(cls, directory: int) -> "FreeSpace":
        return cls(directory, free_bytes(directory))

    @property
    def kept_free_bytes(self) -> int:
        return kept_free_bytes(self.free_before_bytes)

    def left_bytes(self, *, written_bytes: int = 0) -> int:
        """Return how much more the job may write, at least 0.

        `written_bytes`: what it wrote and has not removed, since NFS tells of it only once the server has it.
        """
        free_now_bytes = min(free_bytes(self.directory), self.free_before_bytes - written_bytes)
        return max(0, free_now_bytes - self.kept_free_bytes)
