"""Vms backed up at one instant, and brought back to it together: accepted in one transaction or not at all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, BackupInstant, Operation, Project, Vm
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.sagas.back_up_together import refuse_crowd
from trimtab_controller.services import backup_policies, backup_restore, backups
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services.backup_restore import RestoreSpec
from trimtab_controller.store import backup_instants, backup_repos, keyset, lookup, schema, vms
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound

MEMBERS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantSpec:
    name: str
    # Names; or all vms of a policy.
    vms: Sequence[str] = ()
    policy: str = ""
    # '' takes the policy's, else the only one.
    repo: str = ""
    needs_filesystem: bool = False
    needs_application: bool = False
    bandwidth_mib_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantView:
    instant: BackupInstant
    project_name: str
    repo_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreAllSpec:
    """Every member comes back as a new vm; `{vm}` in the pattern stands for its name."""

    name_pattern: str = "{vm}"
    to_host: str = ""
    pools: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)
    start: bool = True
    # Also where the members have no instant in common.
    allow_broken: bool = False


def create(
    session: Session, spec: InstantSpec, *, project: Project, actor: Actor, now: datetime
) -> tuple[InstantView, Operation]:
    """Accept a backup of several vms at one instant. InvalidRequest, NotFound and Conflict name the vm that cannot be."""
    members, repo_name, verify = _members(session, spec, project)
    repo = repo_service.choose(session, spec.repo or repo_name, project_id=project.id)
    backup_steps.require_ready(session, repo.id)
    refuse_crowd(Counter(vm.host_id for vm in members if vm.host_id))
    instant_id, operation_id = mint("inst"), mint("op")
    run = backups.RunSpec(
        repo=repo.id,
        needs_filesystem=spec.needs_filesystem,
        needs_application=spec.needs_application,
        bandwidth_mib_s=spec.bandwidth_mib_s,
        verify=verify,
    )
    rows = []
    for vm in members:
        view, _operation = backups.run(session, vm, run, project_id=project.id, actor=actor, now=now, together_id=operation_id)
        rows.append({"vm_id": vm.id, "vm_name": vm.name, "backup_id": view.backup.id})
    instant = backup_instants.insert(
        session,
        id=instant_id,
        project_id=project.id,
        repo_id=repo.id,
        name=spec.name,
        state="running",
        members=rows,
        created_at=now,
    )
    operation = accept(
        session,
        "backup.together",
        subject_id=instant.id,
        subject_name=spec.name,
        project_id=project.id,
        params={
            "instant_id": instant.id,
            "repo_id": repo.id,
            "members": {row["vm_id"]: row["backup_id"] for row in rows},
            "needs_filesystem": spec.needs_filesystem,
            "needs_application": spec.needs_application,
            "bandwidth_mib_s": spec.bandwidth_mib_s,
        },
        actor=actor,
        now=now,
        operation_id=operation_id,
    )
    return views(session, (instant,))[0], operation


def _members(session: Session, spec: InstantSpec, project: Project) -> tuple[list[Vm], str, str]:
    if bool(spec.policy) == bool(spec.vms):
        raise InvalidRequest("members-unclear", "vms: name vms, or the policy whose vms they are; not both", field="vms")
    names, repo, verify = list(spec.vms), "", "none"
    if spec.policy:
        policy = backup_policies.find(session, spec.policy, project=project)
        names, repo, verify = list(backup_repos.vms_of_policy(session, policy.id)), policy.repo_id, policy.verify
    if not 2 <= len(set(names)) <= MEMBERS_MAX or len(set(names)) != len(names):
        raise InvalidRequest(
            "members-wrong", f"vms: an instant has 2 to {MEMBERS_MAX} different vms, {len(set(names))} were given", field="vms"
        )
    found = []
    for name in names:
        vm = vms.find(session, project.id, name)
        if vm is None:
            raise NotFound("vm-not-found", f"vms: there is no vm {name} in project {project.name}", field="vms", vm=name)
        found.append(vm)
    return found, repo, verify


def restore(
    session: Session, name: str, spec: RestoreAllSpec, *, project: Project, actor: Actor, now: datetime
) -> tuple[InstantView, tuple[Operation, ...]]:
    """Accept that every member comes back as it was at the instant. Conflict for one that is broken, unless that is allowed."""
    instant = find(session, name, project=project)
    if instant.state != "consistent" and not (spec.allow_broken and instant.state == "broken"):
        raise Conflict(
            "instant-not-consistent",
            f"the vms of instant {instant.name} ({instant.id}) have no moment in common: it is {instant.state}"
            f"{f' ({instant.problem})' if instant.problem else ''}; restore them nevertheless with --allow-broken",
            state=instant.state,
        )
    if "{vm}" not in spec.name_pattern:
        raise InvalidRequest("pattern-wrong", "name_pattern: it lacks {vm}, so all would have one name", field="name_pattern")
    operations = []
    for member in instant.members:
        wanted = RestoreSpec(
            name=spec.name_pattern.replace("{vm}", member["vm_name"]),
            to_host=spec.to_host,
            pools=spec.pools,
            networks=spec.networks,
            start=spec.start,
        )
        _view, operation = backup_restore.restore(session, member["backup_id"], wanted, project=project, actor=actor, now=now)
        operations.append(operation)
    return views(session, (instant,))[0], tuple(operations)


def find(session: Session, name_or_id: str, *, project: Project) -> BackupInstant:
    found = backup_instants.find(session, project.id, name_or_id)
    if found is None:
        raise NotFound(
            "backup-instant-not-found",
            f"there is no backup instant {name_or_id} in project {project.name}; `trimtab backup instant list` shows them",
            instant=name_or_id,
        )
    return found


def get(session: Session, name: str, *, project: Project) -> InstantView:
    return views(session, (find(session, name, project=project),))[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[InstantView, ...], tuple[str, str] | None]:
    found, next_after = backup_instants.page(session, page, project_id=project.id)
    return views(session, found), next_after


def views(session: Session, found: Sequence[BackupInstant]) -> tuple[InstantView, ...]:
    names = lookup.names_in(
        session,
        {schema.project: {one.project_id for one in found}, schema.backup_repo: {one.repo_id for one in found}},
    )
    return tuple(
        InstantView(instant=one, project_name=names.get(one.project_id, ""), repo_name=names.get(one.repo_id, ""))
        for one in found
    )
