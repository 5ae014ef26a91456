"""Backups of several vms at one instant as JSON."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.api.resources.operations import OperationResource
from trimtab_controller.services.backup_instants import InstantView


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantMemberResource:
    vm: str
    vm_id: str
    backup: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupInstantResource:
    id: str
    name: str
    project: str
    repo: str
    # running, consistent, broken: only a consistent one is one moment of all.
    state: str
    problem: str
    members: tuple[InstantMemberResource, ...]
    # Between the first and the last by the clocks of their hosts, and the longest that a guest stood still.
    skew_ms: int
    pause_ms: int
    taken_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupInstantAnswer:
    operation: OperationResource
    instant: BackupInstantResource


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantRestoreAnswer:
    instant: BackupInstantResource
    operations: tuple[OperationResource, ...]


def render_instant(view: InstantView) -> BackupInstantResource:
    one = view.instant
    return BackupInstantResource(
        id=one.id,
        name=one.name,
        project=view.project_name,
        repo=view.repo_name,
        state=one.state,
        problem=one.problem,
        members=tuple(
            InstantMemberResource(vm=member["vm_name"], vm_id=member["vm_id"], backup=member["backup_id"])
            for member in one.members
        ),
        skew_ms=one.skew_ms,
        pause_ms=one.pause_ms,
        taken_at=one.taken_at,
        created_at=one.created_at,
    )
