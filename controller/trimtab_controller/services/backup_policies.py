"""Backup policies of a project: when, where to, for how long, and what is proven of what they make."""

from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import BackupPolicy, Project, Vm
from trimtab_controller.core.retention import Retention
from trimtab_controller.core.schedule import parse_schedule
from trimtab_controller.operations.encrypted import refuse_backup
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services import boot_criteria
from trimtab_controller.store import backup_repos, keyset, lookup, schema
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    name: str
    schedule: str
    zone: str = "UTC"
    jitter_s: int = 0
    # '' takes the only one.
    repo: str = ""
    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0
    verify: str = "none"
    # Of a boot test, all of it: a pattern on the serial port, a TCP port; of neither, the guest agent.
    verify_pattern: str = ""
    verify_tcp: int = 0
    needs_filesystem: bool = False
    # Of the guest's own hook, for its applications; demands the file systems too.
    needs_application: bool = False
    bandwidth_mib_s: int = 0
    is_together: bool = False
    recovers_lost: bool = False
    max_age_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyView:
    policy: BackupPolicy
    project_name: str
    repo_name: str
    vm_names: tuple[str, ...]
    next_at: datetime


def create(session: Session, spec: PolicySpec, *, project: Project, now: datetime) -> PolicyView:
    """Insert the policy. InvalidRequest names the field that cannot be: a schedule that cannot be parsed, a figure out of range."""
    schedule = parse_schedule(spec.schedule, zone=spec.zone, jitter_s=spec.jitter_s)
    Retention(
        last=spec.keep_last,
        hourly=spec.keep_hourly,
        daily=spec.keep_daily,
        weekly=spec.keep_weekly,
        monthly=spec.keep_monthly,
        yearly=spec.keep_yearly,
    )
    _check_proof(spec)
    repo = repo_service.choose(session, spec.repo, project_id=project.id)
    values = {name: value for name, value in asdict(spec).items() if name != "repo"}
    values["schedule"] = schedule.expression
    policy = backup_repos.insert_policy(
        session, policy_id=mint("bpol"), now=now, project_id=project.id, repo_id=repo.id, **values
    )
    return views(session, (policy,), now=now)[0]


def _check_proof(spec: PolicySpec) -> None:
    if spec.verify != "boot":
        for field, wish in (("verify_pattern", spec.verify_pattern), ("verify_tcp", spec.verify_tcp)):
            if wish:
                raise InvalidRequest(
                    "proof-without-boot",
                    f"{field}: what a guest has to show counts with boot tests only: `--verify boot`",
                    field=field,
                )
    boot_criteria.check_pattern(spec.verify_pattern, field="verify_pattern")


def delete(session: Session, name: str, *, project: Project, expected_version: int | None, now: datetime) -> None:
    """Remove a policy; what it made stays. Conflict names the vms that have it."""
    policy = find(session, name, project=project)
    users = backup_repos.vms_of_policy(session, policy.id)
    if users:
        raise Conflict(
            "backup-policy-in-use",
            f"policy {policy.name} is the policy of vms {', '.join(users[:10])}; take it off with "
            "`trimtab vm update VM --backup-policy ''`",
            policy=policy.name,
        )
    backup_repos.delete_policy(session, policy.id, expected_version=expected_version, now=now)


def find(session: Session, name_or_id: str, *, project: Project) -> BackupPolicy:
    policy = backup_repos.find_policy(session, project.id, name_or_id)
    if policy is None:
        raise NotFound(
            "backup-policy-not-found", f"there is no backup policy {name_or_id} in project {project.name}", policy=name_or_id
        )
    return policy


def values_for(session: Session, vm: Vm, name: str, *, now: datetime) -> dict[str, object]:
    """Return the columns of a vm that gets this policy; '' takes it off. Its schedule counts from now."""
    if not name:
        return {"backup_policy_id": "", "backup_asked_at": None}
    policy = backup_repos.find_policy(session, vm.project_id, name)
    if policy is None:
        raise NotFound(
            "backup-policy-not-found", f"backup_policy: there is no backup policy {name} here", field="backup_policy", policy=name
        )
    refuse_backup(session, vm.id)
    return {"backup_policy_id": policy.id, "backup_asked_at": now}


def get(session: Session, name: str, *, project: Project, now: datetime) -> PolicyView:
    return views(session, (find(session, name, project=project),), now=now)[0]


def page(
    session: Session, page: keyset.Page, *, project: Project, now: datetime
) -> tuple[tuple[PolicyView, ...], tuple[str, str] | None]:
    found, next_after = backup_repos.page_policies(session, page, project_id=project.id)
    return views(session, found, now=now), next_after


def views(session: Session, found: tuple[BackupPolicy, ...], *, now: datetime) -> tuple[PolicyView, ...]:
    names = lookup.names_in(
        session,
        {schema.project: {one.project_id for one in found}, schema.backup_repo: {one.repo_id for one in found}},
    )
    return tuple(
        PolicyView(
            policy=one,
            project_name=names.get(one.project_id, ""),
            repo_name=names.get(one.repo_id, ""),
            vm_names=backup_repos.vms_of_policy(session, one.id),
            next_at=parse_schedule(one.schedule, zone=one.zone).next_after(now, subject_id=""),
        )
        for one in found
    )
