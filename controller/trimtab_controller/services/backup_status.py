"""How the vms of a project, or of the fleet, are protected by their backups."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Backup, BackupPolicy, Vm
from trimtab_controller.core.protection import Protection, judge
from trimtab_controller.core.schedule import parse_schedule
from trimtab_controller.store import backup_repos, backups, vms

VMS_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class VmProtection:
    vm: Vm
    policy: BackupPolicy | None
    protection: Protection
    # When its policy asks for the next one.
    next_at: datetime | None


def status(session: Session, *, project_ids: Sequence[str] | None, now: datetime) -> tuple[VmProtection, ...]:
    """Return every live vm of the projects (None: all) by name, with its protection."""
    found = vms.page(session, limit=VMS_MAX, project_ids=project_ids)
    policies = backup_repos.policies(session)
    listed = backups.of_vms(session, [vm.id for vm in found])
    return tuple(_one(vm, policies.get(vm.backup_policy_id), listed[vm.id], now=now) for vm in found)


def _one(vm: Vm, policy: BackupPolicy | None, listed: Sequence[Backup], *, now: datetime) -> VmProtection:
    return VmProtection(
        vm=vm,
        policy=policy,
        protection=judge(
            listed,
            max_age_s=policy.max_age_s if policy is not None else 0,
            has_policy=policy is not None,
            asked_at=vm.backup_asked_at,
            now=now,
        ),
        next_at=next_due(policy, vm) if policy is not None else None,
    )


def next_due(policy: BackupPolicy, vm: Vm) -> datetime | None:
    """Return when the policy asks for the vm's next backup; None before it was given."""
    if vm.backup_asked_at is None:
        return None
    schedule = parse_schedule(policy.schedule, zone=policy.zone, jitter_s=policy.jitter_s)
    return schedule.next_after(vm.backup_asked_at, subject_id=vm.id)
