"""What the jobs of backups do: the request as it was journaled, turned into one run over a repository that was granted before."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial

from trimtab_agent.backup.access import Repositories
from trimtab_agent.backup.holding import Holds
from trimtab_agent.backup.repository.manifests import Manifest, Subject
from trimtab_agent.backup.repository.prune import GRACE_S, prune
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.repository.replication import replicate
from trimtab_agent.backup.repository.verify import BackupHealth, verify_all, verify_backup
from trimtab_agent.backup.running import BackupRequest, DiskToBackUp, run_backup
from trimtab_agent.backup.source import NVRAM, BackupSource
from trimtab_agent.clock import Clock
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.job_rows import JobResult
from trimtab_agent.jobs import JobKind, Runner
from trimtab_protos.agent.v1 import backup_service_pb2 as pb
from trimtab_protos.backup_messages import PruneResult
from trimtab_protos.codec import from_proto
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import (
    BackupDisk,
    BackupSummary,
    DamagedBackup,
    JobProgress,
    PoolSpec,
    RestoreResult,
    VerifyResult,
    VolumeSpec,
)

REPORT_EVERY_S = 1.0
_CREDIT_S = 0.5
"""Of the time in which a job read less than it may, so much is made up for."""
_VERIFY, _PRUNE, _REPLICATE = b"V", b"P", b"R"
"""The first byte of a journaled request of upkeep: three verbs, one class of jobs."""


def backup_runners(repositories: Repositories, source: BackupSource, clock: Clock, holds: Holds) -> Mapping[JobKind, Runner]:
    def back_up(request: bytes, stamp: Stamp, control: JobControl) -> JobResult:  # noqa: ARG001 the domain is not changed
        asked = pb.StartBackupRequest.FromString(request)
        repository = repositories.open(asked.repository)
        try:
            wanted = BackupRequest(
                backup_id=asked.backup_id,
                subject=Subject(repository.config.fleet_id, asked.project_id, asked.vm_id, asked.vm_name),
                disks=[DiskToBackUp(disk.name, disk.volume_id, disk.generation) for disk in asked.disks],
                wants_freeze=asked.wants_freeze,
                needs_filesystem=asked.needs_filesystem,
                needs_application=asked.needs_application,
                notes=dict(asked.notes),
                hold=partial(_hold, holds, asked, control) if asked.instant_id else None,
                scratch=from_proto(asked.scratch_pool, PoolSpec) if asked.HasField("scratch_pool") else None,
            )
            progress = _Progress(control, clock, phase="copying", bandwidth_bytes_s=asked.bandwidth_mib_s << 20)
            return summary_of(run_backup(repository, source, wanted, on_progress=progress))
        finally:
            repository.close()

    def restore(request: bytes, stamp: Stamp, control: JobControl) -> JobResult:  # noqa: ARG001 a volume has no metadata
        asked = pb.StartRestoreRequest.FromString(request)
        volume, pool = from_proto(asked.volume, VolumeSpec), from_proto(asked.pool, PoolSpec)
        repository = repositories.open(asked.repository)
        try:
            with open_backup(repository, asked.vm_id, asked.backup_id) as reader:
                disk = reader.disk(asked.disk)
                progress = _Progress(control, clock, phase="restoring")
                written = source.restore_volume(volume, pool, disk, on_progress=progress)
                if asked.state_for_vm_id and any(file.name == NVRAM for file in reader.manifest.attachments):
                    source.restore_nvram(asked.state_for_vm_id, pool, reader.attachment(NVRAM))
                return RestoreResult(written_bytes=written, root=disk.manifest.root)
        finally:
            repository.close()

    def upkeep(request: bytes, stamp: Stamp, control: JobControl) -> JobResult:  # noqa: ARG001 a repository has no metadata
        if request[:1] == _REPLICATE:
            asked = pb.StartReplicationRequest.FromString(request[1:])
            progress = _Progress(control, clock, phase="replicating", bandwidth_bytes_s=asked.bandwidth_mib_s << 20)
            return _replicate(repositories, asked, progress)
        control.report(JobProgress(phase="verifying" if request[:1] == _VERIFY else "pruning"))
        if request[:1] == _VERIFY:
            return _verify(repositories, pb.StartVerifyRequest.FromString(request[1:]))
        return _prune(repositories, pb.StartPruneRequest.FromString(request[1:]))

    return {JobKind.BACKUP: back_up, JobKind.TOGETHER: back_up, JobKind.RESTORE: restore, JobKind.UPKEEP: upkeep}


def _hold(holds: Holds, asked: pb.StartBackupRequest, control: JobControl) -> Mapping[str, str]:
    control.report(JobProgress(phase="held"))
    bound_s = asked.hold_max_ms / 1000
    report = holds.hold(asked.instant_id, asked.vm_id, bound_s=bound_s, is_cancelled=control.cancelled.is_set)
    return {"instant": asked.instant_id, "instant_state": report.state.value, "held_ms": str(report.held_ms)}


def verify_request(request: pb.StartVerifyRequest) -> bytes:
    return _VERIFY + request.SerializeToString()


def prune_request(request: pb.StartPruneRequest) -> bytes:
    return _PRUNE + request.SerializeToString()


def replication_request(request: pb.StartReplicationRequest) -> bytes:
    return _REPLICATE + request.SerializeToString()


def _replicate(repositories: Repositories, asked: pb.StartReplicationRequest, progress: "_Progress") -> RestoreResult:
    with contextlib.ExitStack() as stack:
        source = repositories.open(asked.repository)
        stack.callback(source.close)
        target = repositories.open(asked.to_repository)
        stack.callback(target.close)
        _count, read = replicate(source, target, on_progress=progress)
    return RestoreResult(written_bytes=read, root="")


def summary_of(manifest: Manifest) -> BackupSummary:
    return BackupSummary(
        backup_id=manifest.backup_id,
        vm_id=manifest.subject.vm_id,
        vm_name=manifest.subject.vm_name,
        project_id=manifest.subject.project_id,
        created_ms=manifest.created_ms,
        consistency=manifest.consistency.value,
        base_id=manifest.base_id,
        notes=dict(manifest.notes),
        disks=tuple(
            BackupDisk(
                name=disk.name,
                volume_id=disk.volume_id,
                generation=disk.generation,
                size_bytes=disk.size_bytes,
                dirty_bytes=disk.dirty_bytes,
                read_bytes=disk.read_bytes,
                stored_bytes=disk.stored_bytes,
                full_reason=disk.full_reason,
                root=disk.root,
            )
            for disk in manifest.disks
        ),
    )


def _verify(repositories: Repositories, asked: pb.StartVerifyRequest) -> VerifyResult:
    repository = repositories.open(asked.repository)
    try:
        if asked.backup_id:
            found = verify_backup(repository, asked.vm_id, asked.backup_id, judges_others=asked.judges_others)
        else:
            found = verify_all(repository)
    finally:
        repository.close()
    return VerifyResult(
        read_bytes=found.read_bytes,
        damaged_records=found.damaged_records,
        damaged=_damaged(found.damaged_backups),
        unreadable_manifests=tuple(found.unreadable_manifests),
        others=_damaged(found.others),
        are_others_judged=found.are_others_judged,
    )


def _damaged(found: Sequence[BackupHealth]) -> tuple[DamagedBackup, ...]:
    return tuple(
        DamagedBackup(backup_id=health.backup_id, vm_id=health.vm_id, parts=tuple(health.damaged_disks)) for health in found
    )


def _prune(repositories: Repositories, asked: pb.StartPruneRequest) -> PruneResult:
    repository = repositories.open(asked.repository)
    try:
        if not asked.is_dry_run:
            for forgotten in asked.forget:
                repository.forget(forgotten.vm_id, forgotten.backup_id)
        found = prune(repository, grace_s=asked.grace_s or GRACE_S, is_dry_run=asked.is_dry_run)
    finally:
        repository.close()
    return PruneResult(
        removed_bytes=found.removed_bytes,
        condemned_bytes=found.condemned_bytes,
        repacked_bytes=found.repacked_bytes,
        kept_bytes=found.kept_bytes,
        waits_for=tuple(found.waits_for),
        retired_data_keys=tuple(found.retired_data_keys),
    )


class _Progress:
    """Reports at most once a second, ends the job where a cancel was asked for, and holds back to a bandwidth."""

    def __init__(self, control: JobControl, clock: Clock, *, phase: str, bandwidth_bytes_s: int = 0) -> None:
        self._control = control
        self._clock = clock
        self._phase = phase
        self._bandwidth = bandwidth_bytes_s
        self._began_s = self._clock.boottime_s()
        self._told_s = 0.0
        self._counted = 0
        self._free_s = self._began_s
        """When what was counted has taken the time that its bandwidth gives it."""

    def __call__(self, done: int, total: int) -> None:
        if self._control.cancelled.is_set():
            raise Conflict("job-cancelled", "cancelled")
        if self._bandwidth:
            self._hold_back(done)
        now_s = self._clock.boottime_s()
        if now_s - self._told_s >= REPORT_EVERY_S:
            self._told_s = now_s
            rate = int(done / max(now_s - self._began_s, 1e-3))
            remaining_s = int((total - done) / rate) if rate else 0
            self._control.report(
                JobProgress(done_bytes=done, total_bytes=total, rate_bytes_s=rate, phase=self._phase, remaining_s=remaining_s)
            )

    def _hold_back(self, done: int) -> None:
        now_s = self._clock.boottime_s()
        # Time in which nothing was read, since a guest was waited for, is not made up for at full speed.
        self._free_s = max(self._free_s, now_s - _CREDIT_S) + (done - self._counted) / self._bandwidth
        self._counted = done
        if self._free_s > now_s:
            # Waits for a cancel rather than sleeps, so that a slow backup ends at once as well.
            self._control.cancelled.wait(self._free_s - now_s)
