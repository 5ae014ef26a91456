"""Takes a volume from one pool of this host to another, under a running guest too. Files are `move_files.py`'s.

Under a guest QEMU copies (libvirt's block copy): it writes whatever the guest writes to both sides, so that the copy comes to an end
however busy the guest is. When both are equal the guest is held still for an instant, goes over to the target, and the source is gone
before it writes again. Whoever starts the vm anew finds one file or the other, never both as candidates.
"""

import os
import threading
import time
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import libvirt

from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.kvm import move_files, volumes
from trimtab_agent.hypervisor.kvm.block_jobs import Disk, disks_of, is_ready, job_of, job_unless_ended, run_on
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domains import Domains, find
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.errors import Conflict, Internal, NoCapacity, NotFound, Unavailable
from trimtab_protos.messages import DomainSpec, JobProgress, LayerResult
from trimtab_protos.volume_messages import VolumeMove

_POLL_S = 0.05
_FULL_BELOW_BYTES = 1 << 20
_FLAGS = (
    # The target was made by us, of a format that nobody probes.
    libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
    # A domain that is defined cannot be copied otherwise; what a job that ended with its guest left is known by its mark.
    | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    # A guest that writes faster than the copy would never be caught up with.
    | libvirt.VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES
)


class Moves:
    """Moves volumes. Thread-safe."""

    def __init__(self, connection: Connection, domains: Domains) -> None:
        self._connection = connection
        self._domains = domains

    def move(self, move: VolumeMove, spec: DomainSpec | None, stamp: Stamp, control: JobControl) -> LayerResult:
        """See `Hypervisor.move_volume`. The vm's lock is not held while QEMU copies: a forced stop must not wait for it."""
        with self._connection.use(f"move volume {move.volume_id}", changes=True) as connection:
            domain = find(connection, move.vm_id) if move.vm_id and spec is not None else None
            with self._domains.locks.hold(move.vm_id or move.volume_id):
                disk = _begin(domain, move)
            if disk is None or spec is None:
                return _copy(move, control)
            _await(domain, disk, move, control)
            with self._domains.locks.hold(move.vm_id):
                paused_ms = _pivot(domain, move)
                self._domains.define_locked(spec, stamp)
        if move.takes_state_files:
            # A guest keeps the seed that it has open; the new definition has its own beside the disk.
            move_files.drop_source(move)
        return LayerResult(size_bytes=move.size_bytes, paused_ms=paused_ms)

    def settle(self, move: VolumeMove, spec: DomainSpec | None, stamp: Stamp, *, is_recorded: bool) -> bool:
        """See `Hypervisor.settle_move`."""
        with (
            self._domains.locks.hold(move.vm_id or move.volume_id),
            self._connection.use(f"settle the move of {move.volume_id}", changes=True) as connection,
        ):
            domain = find(connection, move.vm_id) if move.vm_id and spec is not None else None
            if is_recorded:
                self._leave_source(move, spec, stamp)
                return True
            if not _ends_at_source(domain, move):
                if spec is not None and domain is not None:
                    self._domains.define_locked(spec, stamp)
                return True
            self._domains.refuse_if_used((move_files.target_path(move),), f"the copy of volume {move.volume_id}")
            move_files.drop_copy(move)
            return False

    def _leave_source(self, move: VolumeMove, spec: DomainSpec | None, stamp: Stamp) -> None:
        """The record says that the target is the volume: nothing may need the source any more."""
        target = PoolLayout.of(move.target_pool)
        if not volumes.observe(move.volume_id, target).is_present:
            raise NotFound("volume-not-found", f"volume {move.volume_id} is not in pool {target.pool_id}, where it was moved to")
        if spec is not None:
            self._domains.define_locked(spec, stamp)
        names = volumes.names_of(move.volume_id, PoolLayout.of(move.source_pool))
        self._domains.refuse_if_used(names, f"volume {move.volume_id}")
        move_files.drop_source(move)


def _copy(move: VolumeMove, control: JobControl) -> LayerResult:
    if not move_files.is_at_source(move):
        return LayerResult(size_bytes=move.size_bytes)  # it was moved under a guest, which has ended since

    def report(written: int) -> None:
        control.report(JobProgress(done_bytes=written, total_bytes=max(move.size_bytes, written), phase="copying"))

    move_files.copy(move, volumes.CopyWatch(cancelled=control.cancelled, on_bytes=report))
    return LayerResult(size_bytes=move.size_bytes)


# --- under a running guest ---------------------------------------------------------------------------------------------------


def _disk(domain: Any, move: VolumeMove) -> Disk | None:
    """Return the disk of a guest that runs; None where no guest of this host has the volume."""
    if domain is None or not domain.isActive():
        return None
    return disks_of(domain).get(f"ua-{move.volume_id}")


def _begin(domain: Any, move: VolumeMove) -> Disk | None:
    """Let QEMU begin, or find it at it; None where the volume is to be copied without it."""
    disk = _disk(domain, move)
    if disk is None or disk.chain[0] == move_files.target_path(move):
        return disk
    if disk.chain[0] != move_files.source_path(move):
        raise Conflict("volume-elsewhere", f"the guest has volume {move.volume_id} at another place than was thought")
    if not job_of(domain, disk.target):
        move_files.begin_mirror(move)
        limit = {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: move.bandwidth_bytes_s} if move.bandwidth_bytes_s else {}
        domain.blockCopy(disk.target, mirror_xml(move), limit, _FLAGS)
    elif disk.mirror != move_files.target_path(move):
        raise Conflict("disk-busy", f"QEMU does other work on volume {move.volume_id}; see `virsh blockjob`")
    return disk


def mirror_xml(move: VolumeMove) -> str:
    """Return what libvirt is told of the target."""
    disk = Element("disk", type="file")
    SubElement(disk, "driver", name="qemu", type=move.target_format.value)
    SubElement(disk, "source", file=move_files.target_path(move))
    # It lies over nothing: said, so that libvirt does not look.
    SubElement(disk, "backingStore")
    return ElementTree.tostring(disk, encoding="unicode")


def _await(domain: Any, disk: Disk, move: VolumeMove, control: JobControl) -> None:
    """Block until both sides are equal, or the guest is on the target already."""
    wait = threading.Event()
    while job := job_unless_ended(domain, disk.target):
        done, total = int(job.get("cur", 0)), int(job.get("end", 0))
        control.report(JobProgress(done_bytes=done, total_bytes=total, phase="copying"))
        if is_ready(domain, disk.target):
            return
        if control.cancelled.is_set():
            domain.blockJobAbort(disk.target, 0)
            move_files.drop_copy(move)
            raise Conflict("job-cancelled", "the move was cancelled; the volume is where it was")
        wait.wait(_POLL_S)


def _pivot(domain: Any, move: VolumeMove) -> int:
    """Bring the guest over; return for how many milliseconds it was held still."""
    if _disk(domain, move) is None:
        # Retryable: the next attempt copies it without a guest.
        raise Unavailable("guest-ended", f"the guest of volume {move.volume_id} ended before the copy was whole")
    began = time.monotonic()
    is_running = domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    if is_running:
        domain.suspend()
    try:
        _go_over(domain, move)
    except BaseException:
        disk = _disk(domain, move)
        # On the target with the source still there it stays held: two files would be candidates, and it writes to one of them.
        if disk is not None and disk.chain[0] == move_files.source_path(move) and is_running:
            run_on(domain)
        raise
    if is_running or move.keeps_running:
        run_on(domain)
    return int((time.monotonic() - began) * 1000)


def _go_over(domain: Any, move: VolumeMove) -> None:
    disk = _disk(domain, move)
    if disk is not None and disk.chain[0] == move_files.source_path(move) and job_of(domain, disk.target):
        domain.blockJobAbort(disk.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        disk = _disk(domain, move)
    if disk is None:
        raise Unavailable("guest-ended", f"the guest of volume {move.volume_id} ended before the copy was whole")
    if disk.chain[0] != move_files.target_path(move):
        move_files.drop_copy(move)
        raise _why_not(move)
    move_files.let_go(move, lambda: _disk(domain, move) is not None)


def _why_not(move: VolumeMove) -> Exception:
    space = os.statvfs(PoolLayout.of(move.target_pool).path)
    if space.f_bavail * space.f_frsize < _FULL_BELOW_BYTES:
        return NoCapacity("pool-full", f"pool {move.target_pool.pool_id} has no room left for volume {move.volume_id}")
    return Internal("move-failed", f"QEMU ended the copy of volume {move.volume_id} before it was whole; see the domain's log")


def _ends_at_source(domain: Any, move: VolumeMove) -> bool:
    """End what QEMU does for the move, and tell whether the volume is in the source pool."""
    disk = _disk(domain, move)
    if disk is not None and disk.chain[0] == move_files.target_path(move):
        _pivot(domain, move)
        return False
    if disk is not None and disk.mirror == move_files.target_path(move):
        domain.blockJobAbort(disk.target, 0)
        if move.keeps_running:
            run_on(domain)
    return move_files.is_at_source(move)
