"""Repositories of backups, backups and policies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from trimtab_controller.core.retention import Retention


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupRepo:
    id: str
    name: str
    project_id: str
    kind: str
    url: str
    host_id: str
    settings: Mapping[str, Any]
    wrapped_key: str = field(repr=False)
    wrapped_secret: str = field(repr=False)
    key_id: str
    wrapped_next_key: str = field(repr=False)
    next_key_id: str
    is_next_key_saved: bool
    key_changed_at: datetime | None
    fleet_id: str
    repository_id: str
    state: str
    problem: str
    is_adopted: bool
    kept_bytes: int
    pruned_at: datetime | None
    version: int
    created_at: datetime
    deleted_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPolicy:
    id: str
    project_id: str
    name: str
    repo_id: str
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
    verify_pattern: str
    verify_tcp: int
    needs_filesystem: bool
    needs_application: bool
    bandwidth_mib_s: int
    is_together: bool
    recovers_lost: bool
    max_age_s: int
    version: int
    created_at: datetime
    deleted_at: datetime | None

    @property
    def retention(self) -> Retention:
        return Retention(
            last=self.keep_last,
            hourly=self.keep_hourly,
            daily=self.keep_daily,
            weekly=self.keep_weekly,
            monthly=self.keep_monthly,
            yearly=self.keep_yearly,
            needs_proof=self.verify != "none",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    id: str
    project_id: str
    repo_id: str
    vm_id: str
    vm_name: str
    state: str
    consistency: str
    base_id: str
    full_reason: str
    downgrade: str
    size_bytes: int
    dirty_bytes: int
    read_bytes: int
    stored_bytes: int
    level: int
    verified_at: datetime | None
    booted_at: datetime | None
    recovery_ms: int
    problem: str
    held_until: datetime | None
    manifest: Mapping[str, Any]
    taken_at: datetime | None
    created_at: datetime
    deleted_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupInstant:
    """Backups of several vms as they were at one moment."""

    id: str
    project_id: str
    repo_id: str
    name: str
    state: str
    members: Sequence[Mapping[str, str]]
    skew_ms: int
    pause_ms: int
    problem: str
    taken_at: datetime | None
    created_at: datetime
    deleted_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """Which vms come back from a repository, in which order, and where to."""

    id: str
    project_id: str
    name: str
    repo_id: str
    groups: Sequence[Mapping[str, Any]]
    networks: Mapping[str, str]
    pools: Mapping[str, str]
    cpu_model: str
    last_run: Mapping[str, Any]
    version: int
    created_at: datetime
    deleted_at: datetime | None
