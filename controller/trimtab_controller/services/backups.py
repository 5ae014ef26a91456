"""Backups of vms: accepted, shown with what was proven of them and how old that is, verified, deleted."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Backup, BackupPolicy, BackupRepo, Operation, Project, Vm
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.background import admit_backup
from trimtab_controller.operations.encrypted import refuse_backup
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.store import backup_repos, backups, keyset, lookup, schema, volumes
from trimtab_protos.errors import Conflict, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    # '' takes the policy's, else the only one.
    repo: str = ""
    # None takes the policy's wish, else no.
    needs_filesystem: bool | None = None
    needs_application: bool | None = None
    bandwidth_mib_s: int | None = None
    verify: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupView:
    backup: Backup
    project_name: str
    repo_name: str


def run(
    session: Session, vm: Vm, spec: RunSpec, *, project_id: str, actor: Actor, now: datetime, together_id: str = ""
) -> tuple[BackupView, Operation]:
    """Insert a backup and accept its making. Conflict while the vm is busy with what does not go beside it.

    `together_id`: the operation that begins it with those of other vms, at one instant.
    """
    policy = backup_repos.policies(session).get(vm.backup_policy_id) if vm.backup_policy_id else None
    repo_name = spec.repo or (policy.repo_id if policy is not None else "")
    repo = repo_service.choose(session, repo_name, project_id=project_id)
    backup_steps.require_ready(session, repo.id)
    if not vm.host_id:
        raise Conflict("vm-not-placed", f"vm {vm.name} is on no host; start it with `trimtab vm start {vm.name}`")
    backup_steps.require_reach(repo, vm.host_id)
    refuse_backup(session, vm.id)
    wishes = _wishes(spec, policy)
    if wishes["needs_application"]:
        backup_steps.require_hooks(session, vm.host_id)
    admit_backup(session, vm_id=vm.id, vm_name=vm.name)
    backup = backups.insert(
        session,
        id=mint("bk"),
        project_id=project_id,
        repo_id=repo.id,
        vm_id=vm.id,
        vm_name=vm.name,
        state="running",
        manifest={},
        created_at=now,
    )
    operation = accept(
        session,
        "backup.run",
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=project_id,
        params={
            "backup_id": backup.id,
            "vm_id": vm.id,
            "repo_id": repo.id,
            **wishes,
            **({"together_id": together_id} if together_id else {}),
        },
        actor=actor,
        now=now,
    )
    return views(session, (backup,))[0], operation


def _wishes(spec: RunSpec, policy: BackupPolicy | None) -> dict[str, object]:
    def chosen(asked: object, of_policy: object, otherwise: object) -> object:
        return asked if asked is not None else (of_policy if policy is not None else otherwise)

    return {
        "needs_filesystem": chosen(spec.needs_filesystem, policy and policy.needs_filesystem, False),
        "needs_application": chosen(spec.needs_application, policy and policy.needs_application, False),
        "bandwidth_mib_s": chosen(spec.bandwidth_mib_s, policy and policy.bandwidth_mib_s, 0),
        "verify": chosen(spec.verify, policy and policy.verify, "none"),
    }


def accept_verify(session: Session, backup: Backup, *, actor: Actor, now: datetime) -> Operation:
    backup_steps.require_ready(session, backup.repo_id)
    return accept(
        session,
        "backup.verify",
        subject_id=backup.id,
        subject_name=backup.id,
        project_id=backup.project_id,
        params={"backup_id": backup.id, "repo_id": backup.repo_id},
        actor=actor,
        now=now,
    )


def delete(session: Session, backup_id: str, *, project: Project, actor: Actor, now: datetime) -> Operation | None:
    """Hide a backup and accept that the repository forgets it. None for one that came to nothing: only its row goes."""
    backup = find(session, backup_id, project=project)
    if backup.state == "running":
        raise Conflict("backup-running", f"backup {backup.id} is being made; cancel its operation instead", backup=backup.id)
    if backup.held_until is not None and backup.held_until > now:
        raise Conflict("backup-held", f"backup {backup.id} is held until {backup.held_until:%Y-%m-%d}", backup=backup.id)
    filling = volumes.that_fill(session, backup_id=backup.id)
    if filling:
        raise Conflict(
            "backup-in-use",
            f"volume {filling[0].name} still reads from backup {backup.id}; wait until it stands alone",
            volume_id=filling[0].id,
        )
    if backup.state == "failed":
        backups.hide(session, [backup.id], now=now)
        return None
    return forget(session, [backup], actor=actor, now=now)


def forget(session: Session, gone: Sequence[Backup], *, actor: Actor, now: datetime) -> Operation:
    """Hide backups of one repository and accept that it forgets them."""
    repo = backup_steps.require_ready(session, gone[0].repo_id)
    backups.hide(session, [one.id for one in gone], now=now)
    return accept(
        session,
        "backup.prune",
        subject_id=repo.id,
        subject_name=repo.name,
        project_id="",
        params={"repo_id": repo.id, "forget": [[one.vm_id, one.id] for one in gone], "is_dry_run": False},
        actor=actor,
        now=now,
    )


def prune_repo(session: Session, repo: BackupRepo, *, actor: Actor, now: datetime) -> Operation:
    """Accept the removal of what no listed backup needs."""
    return accept(
        session,
        "backup.prune",
        subject_id=repo.id,
        subject_name=repo.name,
        project_id="",
        params={"repo_id": repo.id, "forget": [], "is_dry_run": False},
        actor=actor,
        now=now,
    )


def hold(session: Session, backup_id: str, until: datetime | None, *, project: Project) -> BackupView:
    """Keep a backup from being pruned until this instant; None lets it go again."""
    backup = find(session, backup_id, project=project)
    backups.update(session, backup.id, held_until=until)
    return views(session, (backups.get(session, backup.id),))[0]


def find(session: Session, backup_id: str, *, project: Project) -> Backup:
    backup = backups.find(session, project.id, backup_id)
    if backup is None:
        raise NotFound(
            "backup-not-found",
            f"there is no backup {backup_id} in project {project.name}; `trimtab backup list` shows them",
            backup=backup_id,
        )
    return backup


def listed(session: Session, backup_id: str, *, project: Project) -> Backup:
    """Return a backup that its repository lists. Conflict for one that is being made or came to nothing."""
    backup = find(session, backup_id, project=project)
    if backup.state not in backups.LISTED:
        why = f": {backup.problem}" if backup.problem else ""
        raise Conflict("backup-not-ready", f"backup {backup.id} is {backup.state}{why}", state=backup.state)
    return backup


def get(session: Session, backup_id: str, *, project: Project) -> BackupView:
    return views(session, (find(session, backup_id, project=project),))[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[BackupView, ...], tuple[str, str] | None]:
    found, next_after = backups.page(session, page, project_id=project.id)
    return views(session, found), next_after


def views(session: Session, found: Sequence[Backup]) -> tuple[BackupView, ...]:
    names = lookup.names_in(
        session,
        {schema.project: {one.project_id for one in found}, schema.backup_repo: {one.repo_id for one in found}},
    )
    return tuple(
        BackupView(backup=one, project_name=names.get(one.project_id, ""), repo_name=names.get(one.repo_id, "")) for one in found
    )
