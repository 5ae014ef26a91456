"""What a backup copies from: an instant of all disks of a vm, served for reading. libvirt's pull job gives one, a simulated vm another."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from trimtab_agent.backup.export.exports import Exported, Exports
from trimtab_agent.backup.nbd import Extent
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_protos.messages import DomainSpec, PoolSpec, VolumeSpec

NVRAM = "nvram.fd"
"""The attachment with the UEFI variables of a vm that boots by UEFI."""


class DiskContent(Protocol):
    """One disk as it was at the instant; `NbdClient` is one."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def request_max_bytes(self) -> int: ...

    def extents(self, context: str, *, offset: int = 0, length: int | None = None) -> Iterator[Extent]: ...

    def read_pieces(self, ranges: Iterable[tuple[int, int]], piece_bytes: int) -> Iterator[tuple[int, bytearray]]: ...


@dataclass(frozen=True, slots=True)
class DiskWish:
    """A disk to copy, and since when."""

    name: str
    """As the domain names it: vda."""
    base_checkpoint: str = ""
    """The checkpoint of the last listed backup; empty for all of the disk."""


@dataclass(frozen=True, slots=True)
class ServedDisk:
    name: str
    content: DiskContent
    bitmap: str = ""
    """The context that tells what is dirty; empty where all of the disk is to be read."""
    denied: str = ""
    """Why an increment that was wished for is not possible."""


@dataclass(frozen=True, slots=True)
class ToldApart:
    """A disk whose changes another export tells than the one that has its content."""

    content: DiskContent
    changes: DiskContent
    context: str
    """The one that `changes` is asked for."""

    @property
    def size_bytes(self) -> int:
        return self.content.size_bytes

    @property
    def request_max_bytes(self) -> int:
        return self.content.request_max_bytes

    def extents(self, context: str, *, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        told = self.changes if context == self.context else self.content
        return told.extents(context, offset=offset, length=length)

    def read_pieces(self, ranges: Iterable[tuple[int, int]], piece_bytes: int) -> Iterator[tuple[int, bytearray]]:
        return self.content.read_pieces(ranges, piece_bytes)


@dataclass(frozen=True, slots=True)
class Instant:
    """All disks at one point in time."""

    created_ms: int
    consistency: Consistency
    disks: Sequence[ServedDisk]
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    """For people: why the consistency is less than was wished, how long the guest was frozen, what its hook failed with afterwards."""
    checkpoint: str | None = None
    """"" where a disk could not be marked, so that the next backup reads all. None: the checkpoint that was asked for."""
    is_at_rest: bool = False
    """The vm does not run, so that no application of it is in the midst of anything."""
    not_asked: str = ""
    """Why its applications were not held, where nothing failed: there is nobody to ask."""


class InstantSource(Protocol):
    """Volumes of one host that are used before they are filled from a backup."""

    def serve(self, volume_id: str, exported: Exported, exports: Exports) -> None:
        """Have the disk of the backup served to the volume. Idempotent; before each start of its guest."""

    def lay_over(self, volume: VolumeSpec, pool: PoolSpec, exported: Exported, disk: DiskReader) -> None:
        """Make the volume anew: empty, it reads as the disk that is served to it. Conflict: a domain of this host uses it."""

    def fill(
        self,
        spec: DomainSpec,
        volume: VolumeSpec,
        pool: PoolSpec,
        stamp: Stamp,
        *,
        bandwidth_bytes_s: int,
        control: JobControl,
    ) -> int:
        """Copy what the volume still reads from the backup, then end what serves it; return the bytes that were looked at.

        Idempotent. Unavailable `fill-waits` where the guest does not run, or ended meanwhile: what was copied stays.
        """


Hold = Callable[[], Mapping[str, str]]
"""Blocks while a guest is to stand still; returns what is noted of it."""


class BackupSource(Protocol):
    """The vms of one host, as something to copy from."""

    @property
    def instants(self) -> InstantSource: ...

    def serve(
        self,
        vm_id: str,
        wishes: Sequence[DiskWish],
        *,
        checkpoint: str,
        wants_freeze: bool,
        hold: Hold | None = None,
        scratch: PoolSpec | None = None,
    ) -> AbstractContextManager[Instant]:
        """Fix an instant under a new checkpoint and serve it until the block ends. The guest runs on; a stopped one stays stopped.

        `scratch`: a pool of files, for what guests overwrite meanwhile of disks that are no files.
        With `hold` the guest stands still, its file systems frozen or else the guest itself paused, from before the instant until
        `hold` returns.

        Conflict: the vm is busy; NotFound: no such vm; NoCapacity `scratch-full`, then or later: no room for what guests overwrite.
        """

    def keep_checkpoint(self, vm_id: str, checkpoint: str) -> None:
        """The backup of this instant is listed: later increments begin here, older checkpoints are dropped. Idempotent."""

    def drop_checkpoint(self, vm_id: str, checkpoint: str) -> None:
        """The backup of this instant is not listed: what changed since counts for the checkpoint before. Idempotent."""

    def restore_volume(
        self, volume: VolumeSpec, pool: PoolSpec, disk: DiskReader, *, on_progress: Callable[[int, int], None]
    ) -> int:
        """Make the volume anew, fill it with the disk, read it back and compare; return the bytes written.

        Conflict: a domain of this host uses it, or it reads back differently. NoCapacity: the pool is full.
        """

    def restore_nvram(self, vm_id: str, pool: PoolSpec, content: bytes) -> None:
        """Put the UEFI variables of a vm that is to be defined into its pool. Idempotent."""
