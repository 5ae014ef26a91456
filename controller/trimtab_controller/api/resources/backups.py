"""Repositories, policies, backups and protection as JSON. Keys are never among them, but in the one answer that shows a new one."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.api.render import etag_of
from trimtab_controller.api.resources.operations import OperationResource
from trimtab_controller.core.model import Backup
from trimtab_controller.services.backup_policies import PolicyView
from trimtab_controller.services.backup_repos import RepoView
from trimtab_controller.services.backup_status import VmProtection
from trimtab_controller.services.backups import BackupView


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupRepoResource:
    id: str
    name: str
    # folder or bucket.
    kind: str
    url: str
    # '' where every host reaches it.
    host: str
    # '' where it keeps vms of the whole fleet.
    project: str
    # Of a bucket.
    endpoint: str
    region: str
    # unconfirmed, opening, ready, failed.
    state: str
    problem: str
    # Names the key without telling it; the one that a rotation is about to bring, '' for none; when it was last changed.
    key_id: str
    next_key_id: str
    key_changed_at: datetime | None
    fleet_id: str
    repository_id: str
    backups: int
    # Of the disks of all backups, and what they added to the repository.
    size_bytes: int
    stored_bytes: int
    dedup_ratio: float
    # What the last prune found to be needed.
    kept_bytes: int
    pruned_at: datetime | None
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupRepoAnswer:
    repo: BackupRepoResource
    # Shown this once; the repository is made when it comes back with `:confirm`. '' where it was given.
    key: str
    operation: OperationResource | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPolicyResource:
    id: str
    name: str
    project: str
    repo: str
    schedule: str
    zone: str
    jitter_s: int
    keep_last: int
    keep_hourly: int
    keep_daily: int
    keep_weekly: int
    keep_monthly: int
    keep_yearly: int
    verify: str
    # Of a boot test: what its guest shows, all of it; of neither, the guest agent.
    verify_pattern: str
    verify_tcp: int
    needs_filesystem: bool
    needs_application: bool
    bandwidth_mib_s: int
    is_together: bool
    recovers_lost: bool
    max_age_s: int
    vms: tuple[str, ...]
    # Without the vm's own jitter.
    next_at: datetime
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupDiskResource:
    name: str
    size_bytes: int
    dirty_bytes: int
    read_bytes: int
    stored_bytes: int
    full_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupResource:
    id: str
    vm: str
    vm_id: str
    project: str
    repo: str
    # running, ready, damaged, failed.
    state: str
    problem: str
    # crash, filesystem or application; why less than was wished for.
    consistency: str
    downgrade: str
    base_id: str
    full_reason: str
    size_bytes: int
    dirty_bytes: int
    read_bytes: int
    stored_bytes: int
    # What was proven of it, and how old that is: L0 written, L1 read back, L2 restored and compared, L3 booted.
    level: str
    verified_at: datetime | None
    verified_age_s: float | None
    booted_at: datetime | None
    recovery_ms: int
    held_until: datetime | None
    disks: tuple[BackupDiskResource, ...]
    taken_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupAnswer:
    operation: OperationResource
    backup: BackupResource


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionResource:
    vm: str
    vm_id: str
    policy: str
    last_good: str
    last_good_at: datetime | None
    last_verified: str
    last_verified_at: datetime | None
    last_booted: str
    last_booted_at: datetime | None
    # Of that boot.
    recovery_ms: int
    # What would be lost now, and the longest time between two kept backups; None: everything.
    loss_window_s: float | None
    widest_gap_s: float | None
    next_at: datetime | None
    problem: str


def render_repo(view: RepoView) -> BackupRepoResource:
    repo = view.repo
    return BackupRepoResource(
        id=repo.id,
        name=repo.name,
        kind=repo.kind,
        url=repo.url,
        host=view.host_name,
        project=view.project_name,
        endpoint=str(repo.settings.get("endpoint", "")),
        region=str(repo.settings.get("region", "")),
        state=repo.state,
        problem=repo.problem,
        key_id=repo.key_id,
        next_key_id=repo.next_key_id,
        key_changed_at=repo.key_changed_at,
        fleet_id=repo.fleet_id,
        repository_id=repo.repository_id,
        backups=view.backups,
        size_bytes=view.size_bytes,
        stored_bytes=view.stored_bytes,
        dedup_ratio=view.dedup_ratio,
        kept_bytes=repo.kept_bytes,
        pruned_at=repo.pruned_at,
        version=repo.version,
        etag=etag_of(repo.version),
        created_at=repo.created_at,
    )


def render_policy(view: PolicyView) -> BackupPolicyResource:
    policy = view.policy
    return BackupPolicyResource(
        id=policy.id,
        name=policy.name,
        project=view.project_name,
        repo=view.repo_name,
        schedule=policy.schedule,
        zone=policy.zone,
        jitter_s=policy.jitter_s,
        keep_last=policy.keep_last,
        keep_hourly=policy.keep_hourly,
        keep_daily=policy.keep_daily,
        keep_weekly=policy.keep_weekly,
        keep_monthly=policy.keep_monthly,
        keep_yearly=policy.keep_yearly,
        verify=policy.verify,
        verify_pattern=policy.verify_pattern,
        verify_tcp=policy.verify_tcp,
        needs_filesystem=policy.needs_filesystem,
        needs_application=policy.needs_application,
        bandwidth_mib_s=policy.bandwidth_mib_s,
        is_together=policy.is_together,
        recovers_lost=policy.recovers_lost,
        max_age_s=policy.max_age_s,
        vms=view.vm_names,
        next_at=view.next_at,
        version=policy.version,
        etag=etag_of(policy.version),
        created_at=policy.created_at,
    )


def render_backup(view: BackupView, *, now: datetime) -> BackupResource:
    backup = view.backup
    age_s = round((now - backup.verified_at).total_seconds(), 1) if backup.verified_at else None
    return BackupResource(
        id=backup.id,
        vm=backup.vm_name,
        vm_id=backup.vm_id,
        project=view.project_name,
        repo=view.repo_name,
        state=backup.state,
        problem=backup.problem,
        consistency=backup.consistency,
        downgrade=backup.downgrade,
        base_id=backup.base_id,
        full_reason=backup.full_reason,
        size_bytes=backup.size_bytes,
        dirty_bytes=backup.dirty_bytes,
        read_bytes=backup.read_bytes,
        stored_bytes=backup.stored_bytes,
        level=f"L{backup.level}",
        verified_at=backup.verified_at,
        verified_age_s=age_s,
        booted_at=backup.booted_at,
        recovery_ms=backup.recovery_ms,
        held_until=backup.held_until,
        disks=tuple(
            BackupDiskResource(
                name=disk["name"],
                size_bytes=disk["size_bytes"],
                dirty_bytes=disk["dirty_bytes"],
                read_bytes=disk["read_bytes"],
                stored_bytes=disk["stored_bytes"],
                full_reason=disk["full_reason"],
            )
            for disk in backup.manifest.get("disks", ())
        ),
        taken_at=backup.taken_at,
        created_at=backup.created_at,
    )


def render_protection(one: VmProtection) -> ProtectionResource:
    found = one.protection
    return ProtectionResource(
        vm=one.vm.name,
        vm_id=one.vm.id,
        policy=one.policy.name if one.policy is not None else "",
        last_good=_id(found.last_good),
        last_good_at=_taken(found.last_good),
        last_verified=_id(found.last_verified),
        last_verified_at=found.last_verified.verified_at if found.last_verified else None,
        last_booted=_id(found.last_booted),
        last_booted_at=found.last_booted.booted_at if found.last_booted else None,
        recovery_ms=found.last_booted.recovery_ms if found.last_booted else 0,
        loss_window_s=round(found.loss_window_s, 1) if found.loss_window_s is not None else None,
        widest_gap_s=round(found.widest_gap_s, 1) if found.widest_gap_s is not None else None,
        next_at=one.next_at,
        problem=found.problem,
    )


def _id(backup: Backup | None) -> str:
    return backup.id if backup is not None else ""


def _taken(backup: Backup | None) -> datetime | None:
    return backup.taken_at if backup is not None else None
