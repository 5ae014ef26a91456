"""Disks of simulated vms as something to back up: content in memory, checkpoints with what changed since, faults on demand."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimtab_agent.backup.export.exports import Exported, Exports
from trimtab_agent.backup.nbd import ALLOCATION, DIRTY, HOLE, ZERO, Extent
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.backup.source import NVRAM, DiskWish, Hold, Instant, ServedDisk
from trimtab_agent.clock import Clock
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.kvm import block_pools
from trimtab_agent.hypervisor.kvm.domain_xml import target_name
from trimtab_agent.hypervisor.simulated_domains import ACTIVE
from trimtab_protos.errors import Conflict, NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import DiskFormat, DomainSpec, JobProgress, PoolSpec, VolumeSpec

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

GRAIN_BYTES = 65536
BITMAP = "qemu:dirty-bitmap:backup"


@dataclass(slots=True)
class SimulatedDisk:
    """A disk that a test or a simulated guest writes through `write`."""

    content: bytearray
    checkpoints: dict[str, set[int]] = field(default_factory=dict)
    """Checkpoint → numbers of the grains that changed since, oldest first."""
    is_raw: bool = False
    """What changed on it is known to its QEMU alone, and lost with it."""
    reads_left: int | None = None
    """After so many reads the guest stops and the export breaks; None never."""

    def write(self, offset: int, content: bytes) -> None:
        self.content[offset : offset + len(content)] = content
        grains = range(offset // GRAIN_BYTES, -(-(offset + len(content)) // GRAIN_BYTES))
        for changed in self.checkpoints.values():
            changed.update(grains)


@dataclass(slots=True)
class SimulatedVm:
    disks: dict[str, SimulatedDisk]
    is_running: bool = True
    has_guest_agent: bool = True
    is_busy: bool = False
    hook_exits: int | None = None
    """What the hook of its owner ends with; None where it has none."""
    hook_says: str = ""
    hook_thaw_says: str = ""
    """What its other half fails with."""
    hooked: list[str] = field(default_factory=list)
    """The halves of the hook that were run."""
    starts: int = 0
    """How often it was started when it was looked at last."""

    def lose_checkpoints(self) -> None:
        """QEMU was killed: bitmaps that were only in memory are gone."""
        for disk in self.disks.values():
            disk.checkpoints.clear()


class _Served:
    def __init__(self, disk: SimulatedDisk, dirty: set[int] | None) -> None:
        self.size_bytes = len(disk.content)
        self.request_max_bytes = 32 << 20
        self._disk = disk
        self._content = bytes(disk.content)  # the instant
        self._dirty = dirty

    def extents(self, context: str, *, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        end = self.size_bytes if length is None else offset + length
        while offset < end:
            after = min(end, (offset // GRAIN_BYTES + 1) * GRAIN_BYTES)
            yield Extent(offset, after - offset, self._flags(context, offset, after))
            offset = after

    def read_pieces(self, ranges: Iterable[tuple[int, int]], piece_bytes: int) -> Iterator[tuple[int, bytearray]]:
        for begin, length in ranges:
            for offset in range(begin, begin + length, piece_bytes):
                if self._disk.reads_left is not None:
                    self._disk.reads_left -= 1
                    if self._disk.reads_left < 0:
                        raise Unavailable("disk-export-lost", "the export of the disk broke off; the guest may have stopped")
                yield offset, bytearray(self._content[offset : min(offset + piece_bytes, begin + length)])

    def _flags(self, context: str, begin: int, end: int) -> int:
        if context == ALLOCATION:
            return 0 if self._content[begin:end].strip(b"\0") else HOLE | ZERO
        assert self._dirty is not None
        return DIRTY if begin // GRAIN_BYTES in self._dirty else 0


class SimulatedInstants:
    """The `InstantSource` of simulated vms: a volume is whole as soon as it is laid over, and counted as filling until it was filled."""

    def __init__(self, backups: "SimulatedBackups") -> None:
        self._backups = backups
        self.served: dict[str, Exported] = {}
        """By volume, what is served to it now."""
        self.may_fill = True
        """Unset, filling waits as it does for a guest that does not run."""

    def serve(self, volume_id: str, exported: Exported, exports: Exports) -> None:  # noqa: ARG002 - there is no process
        self.served[volume_id] = exported

    def lay_over(self, volume: VolumeSpec, pool: PoolSpec, exported: Exported, disk: DiskReader) -> None:  # noqa: ARG002
        self._backups.restore_volume(volume, pool, disk, on_progress=lambda _done, _total: None)

    def fill(
        self,
        spec: DomainSpec,
        volume: VolumeSpec,
        pool: PoolSpec,  # noqa: ARG002
        stamp: Stamp,  # noqa: ARG002
        *,
        bandwidth_bytes_s: int,  # noqa: ARG002
        control: JobControl,
    ) -> int:
        control.report(JobProgress(phase="filling", total_bytes=volume.size_bytes))
        if control.cancelled.is_set():
            raise Conflict("job-cancelled", "filling the volume was cancelled; it still reads from its backup")
        if not self.may_fill:
            raise Unavailable("fill-waits", f"volume {volume.volume_id} still reads from its backup", vm_id=spec.vm_id)
        self.served.pop(volume.volume_id, None)
        return volume.size_bytes


class SimulatedBackups:
    """The `BackupSource` of simulated vms."""

    def __init__(self, clock: Clock, *, auto_disk_bytes: int = 0, hypervisor: "SimulatedHypervisor | None" = None) -> None:
        """With `auto_disk_bytes` a vm that nobody described has empty disks of this size, as many as are asked for.

        With a hypervisor the vms are its domains, their disks lie in its pools, and the fleet keeps what is in them, whatever
        host they are on: as much of each as `auto_disk_bytes`, since a test need not fill gigabytes.
        """
        self._clock = clock
        self._auto_disk_bytes = auto_disk_bytes
        self._hypervisor = hypervisor
        self.instants = SimulatedInstants(self)
        self.vms: dict[str, SimulatedVm] = {}
        self.volumes: dict[str, bytes] = {}
        """What was restored, by volume."""
        self.nvrams: dict[str, bytes] = {}
        """UEFI variables that were restored, by vm."""
        self.fails_with: TrimtabError | None = None
        """Raised once a backup has begun, as by a storage that fills up."""

    @contextlib.contextmanager
    def serve(
        self,
        vm_id: str,
        wishes: Sequence[DiskWish],
        *,
        checkpoint: str,
        wants_freeze: bool,
        hold: Hold | None = None,
        scratch: PoolSpec | None = None,
    ) -> Iterator[Instant]:
        if self._hypervisor is not None:
            self._take(self._hypervisor, vm_id)
            _require_scratch(self._hypervisor, vm_id, scratch)
        elif self._auto_disk_bytes and vm_id not in self.vms:
            self.vms[vm_id] = SimulatedVm({wish.name: SimulatedDisk(bytearray(self._auto_disk_bytes)) for wish in wishes})
        vm = self._vm(vm_id)
        if vm.is_busy:
            raise Conflict("vm-busy", "another job of this domain is under way, such as a migration")
        vm.is_busy = True
        try:
            if self.fails_with is not None:
                raise self.fails_with
            is_asked = vm.is_running and wants_freeze and vm.has_guest_agent
            with _hooked(vm, is_asked=is_asked):
                served = [_serve(vm.disks[wish.name], wish) for wish in wishes]
                taken_ms = self._clock.now_ms()
                held = hold() if hold is not None else {}
            for wish in wishes:
                if vm.is_running or not vm.disks[wish.name].is_raw:
                    vm.disks[wish.name].checkpoints[checkpoint] = set()
            files = {"domain.xml": b"<domain/>", NVRAM: vm_id.encode()}
            consistency, notes = _consistency(vm, wants_freeze=wants_freeze)
            is_at_rest = not vm.is_running
            not_asked = "the guest has no hook" if vm.hook_exits is None else ""
            yield Instant(taken_ms, consistency, served, files, {**notes, **held}, is_at_rest=is_at_rest, not_asked=not_asked)
        finally:
            vm.is_busy = False

    def keep_checkpoint(self, vm_id: str, checkpoint: str) -> None:
        for disk in self._vm(vm_id).disks.values():
            for name in [name for name in disk.checkpoints if name != checkpoint]:
                del disk.checkpoints[name]

    def drop_checkpoint(self, vm_id: str, checkpoint: str) -> None:
        for disk in self._vm(vm_id).disks.values():
            disk.checkpoints.pop(checkpoint, None)

    def restore_volume(
        self,
        volume: VolumeSpec,
        pool: PoolSpec,
        disk: DiskReader,
        *,
        on_progress: Callable[[int, int], None],
    ) -> int:
        if self._hypervisor is not None:
            self._hypervisor.ensure_volume(volume, pool)
        content = bytearray(disk.manifest.size_bytes)

        def write(offset: int, piece: bytes) -> None:
            content[offset : offset + len(piece)] = piece
            on_progress(offset, volume.size_bytes)

        written = disk.copy_to(write)
        self.volumes[volume.volume_id] = bytes(content)
        if self._hypervisor is not None:
            self._hypervisor.fleet.disk_contents[volume.volume_id] = content
        return written

    def restore_nvram(self, vm_id: str, pool: PoolSpec, content: bytes) -> None:  # noqa: ARG002 - one place for all
        self.nvrams[vm_id] = content

    def look_at(self, vm_id: str) -> SimulatedVm:
        """Return the vm as it is now, for a test that writes to its disks."""
        if self._hypervisor is not None:
            self._take(self._hypervisor, vm_id)
        return self._vm(vm_id)

    def _take(self, hypervisor: "SimulatedHypervisor", vm_id: str) -> None:
        """Take the domain as it is now; checkpoints and faults of its disks stay, unless a disk became another volume."""
        domain = hypervisor.domains.get(vm_id)
        if domain is None:
            self.vms.pop(vm_id, None)
            return
        known = self.vms.get(vm_id)
        disks = {}
        for spec in domain.spec.disks:
            content = hypervisor.fleet.disk_contents.setdefault(spec.volume_id, bytearray(self._auto_disk_bytes))
            name = target_name(spec)
            before = known.disks.get(name) if known is not None else None
            disks[name] = before if before is not None and before.content is content else SimulatedDisk(content)
            disks[name].is_raw = spec.format is DiskFormat.RAW
        is_running = domain.state in ACTIVE
        if known is None or not is_running or known.starts != domain.starts:
            for disk in disks.values():
                if disk.is_raw:
                    disk.checkpoints.clear()
        if known is None:
            self.vms[vm_id] = SimulatedVm(disks, is_running=is_running, starts=domain.starts)
        else:
            known.disks, known.is_running, known.starts = disks, is_running, domain.starts

    def _vm(self, vm_id: str) -> SimulatedVm:
        if vm_id not in self.vms:
            raise NotFound("domain-not-found", f"this host has no domain of {vm_id}", vm_id=vm_id)
        return self.vms[vm_id]


@contextlib.contextmanager
def _hooked(vm: SimulatedVm, *, is_asked: bool) -> Iterator[None]:
    if not is_asked or vm.hook_exits is None:
        yield
        return
    vm.hooked.append("freeze")
    try:
        yield
    finally:
        vm.hooked.append("thaw")


def _consistency(vm: SimulatedVm, *, wants_freeze: bool) -> tuple[Consistency, dict[str, str]]:
    if not vm.is_running:
        return Consistency.FILESYSTEM, {}
    if not wants_freeze:
        return Consistency.CRASH, {}
    if not vm.has_guest_agent:
        return Consistency.CRASH, {"downgrade": "the guest has no agent"}
    if vm.hook_exits is None:
        return Consistency.FILESYSTEM, {}
    if vm.hook_exits:
        return Consistency.FILESYSTEM, {"downgrade": f"the guest's hook failed with exit code {vm.hook_exits}: {vm.hook_says}"}
    return Consistency.APPLICATION, {"hook_thaw": vm.hook_thaw_says} if vm.hook_thaw_says else {}


def _require_scratch(hypervisor: "SimulatedHypervisor", vm_id: str, scratch: PoolSpec | None) -> None:
    domain = hypervisor.domains.get(vm_id)
    if domain is None or domain.state not in ACTIVE or scratch is not None:
        return
    if any(block_pools.is_block(pool) for pool in domain.spec.pools):
        raise Conflict("scratch-pool-missing", "a disk is no file, and no pool of files was named for what its guest overwrites")


def _serve(disk: SimulatedDisk, wish: DiskWish) -> ServedDisk:
    if not wish.base_checkpoint:
        return ServedDisk(wish.name, _Served(disk, None))
    if wish.base_checkpoint not in disk.checkpoints:
        return ServedDisk(wish.name, _Served(disk, None), denied=f"this host does not know the checkpoint {wish.base_checkpoint}")
    return ServedDisk(wish.name, _Served(disk, set(disk.checkpoints[wish.base_checkpoint])), BITMAP)
