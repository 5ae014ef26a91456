"""Recovery plans of a project: written down, looked at, run. What a run does is in `operations/sagas/run_recovery.py` and in
`loops/recoveries.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core import recovery_plans as core
from trimtab_controller.core.model import Actor, Backup, Operation, Project, RecoveryPlan
from trimtab_controller.core.recovery_plans import Awaits, Group, Mode, Outcome, Run, VmRun
from trimtab_controller.operations import backup_steps, recovery_runs
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import backup_repos as repo_service
from trimtab_controller.services import backup_restore, boot_criteria, restore_mapping
from trimtab_controller.services.backup_restore import RestoreSpec
from trimtab_controller.store import backup_settings, backups, keyset, lookup, operations, recovery_plans, schema
from trimtab_protos.errors import Conflict, NotFound, TrimtabError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    name: str
    groups: Sequence[Group]
    # '' takes the only one.
    repo: str = ""
    # Name in the backups -> name here; what is not named keeps its name.
    networks: Mapping[str, str] = field(default_factory=dict)
    pools: Mapping[str, str] = field(default_factory=dict)
    cpu_model: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    plan: RecoveryPlan
    groups: Sequence[Group]
    project_name: str
    repo_name: str


def create(session: Session, spec: PlanSpec, *, project: Project, now: datetime) -> PlanView:
    """Insert the plan. InvalidRequest names what no run can follow."""
    core.check(spec.groups)
    repo = repo_service.choose(session, spec.repo, project_id=project.id)
    plan = recovery_plans.insert(
        session,
        plan_id=mint("rplan"),
        now=now,
        project_id=project.id,
        name=spec.name,
        repo_id=repo.id,
        groups=[recovery_runs.group_json(group) for group in spec.groups],
        networks=dict(spec.networks),
        pools=dict(spec.pools),
        cpu_model=spec.cpu_model,
    )
    return views(session, (plan,))[0]


def import_from(session: Session, spec: PlanSpec, *, project: Project, now: datetime) -> PlanView:
    """Insert a plan as the newest backup in the repository that knows it says it; what `spec` names anew goes before what that says.

    A backup tells the plans that named its vm when it was made. NotFound tells which plans the repository's backups do know.
    """
    repo = repo_service.choose(session, spec.repo, project_id=project.id)
    known = _plans_in(session, repo.id, project=project)
    found = known.get(spec.name)
    if found is None:
        told = ", ".join(sorted(known)) or "none: a backup tells the plans that name its vm when it is made"
        raise NotFound(
            "recovery-plan-not-in-repository",
            f"name: no backup of project {project.name} in repository {repo.name} knows a recovery plan {spec.name}; they know {told}. "
            f"`trimtab backup repo rebuild {repo.name}` reads anew what it lists",
            field="name",
        )
    wanted = PlanSpec(
        name=spec.name,
        groups=recovery_runs.groups_from(found["groups"]),
        repo=repo.name,
        networks={**found["networks"], **spec.networks},
        pools={**found["pools"], **spec.pools},
        cpu_model=str(found["cpu_model"]),
    )
    return create(session, wanted, project=project, now=now)


def _plans_in(session: Session, repo_id: str, *, project: Project) -> dict[str, Mapping[str, Any]]:
    """Return the plans that the project's listed backups know by name, each as the newest of them says it."""
    listed = [one for one in backups.of_repo(session, repo_id) if one.state in backups.LISTED and one.project_id == project.id]
    known: dict[str, Mapping[str, Any]] = {}
    for backup in sorted(listed, key=lambda one: (one.taken_at or one.created_at, one.id)):
        plans = (backup.manifest.get("settings") or {}).get(backup_settings.PLANS, ())
        known |= {str(plan["name"]): plan for plan in plans}
    return known


def delete(session: Session, name: str, *, project: Project, expected_version: int | None, now: datetime) -> None:
    """Remove a plan; what it brought back stays. Conflict while it runs."""
    plan = find(session, name, project=project)
    live = operations.live_exclusive(session, plan.id)
    if live is not None:
        raise Conflict("recovery-running", f"plan {plan.name} is being run ({live.id}): `trimtab op cancel {live.id}` first")
    recovery_plans.change(session, plan.id, expected_version=expected_version, deleted_at=now)


def run(session: Session, name: str, *, mode: Mode, project: Project, actor: Actor, now: datetime) -> Operation:
    """Accept a run. Conflict while another one goes on, or where the repository cannot be used."""
    plan = find(session, name, project=project)
    backup_steps.require_ready(session, plan.repo_id)
    return accept(
        session,
        "recovery.run",
        subject_id=plan.id,
        subject_name=plan.name,
        project_id=project.id,
        params={"plan_id": plan.id, "mode": mode.value},
        actor=actor,
        now=now,
    )


def preview(session: Session, name: str, *, mode: Mode, project: Project, now: datetime) -> tuple[PlanView, Run]:
    """Return what a run would bring back now, from which backup, what each vm would lose, and what stands against it."""
    plan = find(session, name, project=project)
    run = recovery_runs.planned(session, plan, mode=mode, now=now)
    view = views(session, (plan,))[0]
    for i, (wanted, group) in enumerate(zip(view.groups, run.groups, strict=True)):
        run = core.with_vms(run, i, [_checked(session, plan, wanted, one, mode, project) for one in group.vms], now=now)
    return view, run


def _checked(session: Session, plan: RecoveryPlan, group: Group, one: VmRun, mode: Mode, project: Project) -> VmRun:
    """Return the vm with what a restore of it would be refused for, as far as rows tell."""
    if one.outcome is not Outcome.WAITING:
        return one
    try:
        backup = backups.get(session, one.backup_id)
        settings = backup_restore.settings_of(backup)
        if group.tcp and mode is Mode.TEST:
            boot_criteria.require_cards(settings, backup, field="tcp")
        for saved in settings["volumes"]:
            restore_mapping.pool_for(session, saved["pool"], plan.pools)
        for nic in settings["nics"] if mode is Mode.REAL else ():
            restore_mapping.network_for(session, nic["network"], plan.networks, project=project)
    except TrimtabError as refused:
        return core.failed(one, refused.message)
    return one


def accept_one(
    session: Session, plan: RecoveryPlan, group: Group, one: VmRun, *, mode: Mode, project: Project, actor: Actor, now: datetime
) -> Operation:
    """Accept the restore, or the boot test, of one vm. Raises whatever refuses it."""
    backup = backups.get(session, one.backup_id)
    if mode is Mode.TEST:
        return _boot_test(session, plan, group, backup, project=project, actor=actor, now=now)
    spec = RestoreSpec(
        name=one.vm,
        pools=plan.pools,
        networks=plan.networks,
        cpu_model=plan.cpu_model,
        awaits="" if group.awaits is Awaits.STARTED else group.awaits.value,
        pattern=group.pattern,
        timeout_s=group.timeout_s,
    )
    return backup_restore.restore(session, backup.id, spec, project=project, actor=actor, now=now)[1]


def _boot_test(
    session: Session, plan: RecoveryPlan, group: Group, backup: Backup, *, project: Project, actor: Actor, now: datetime
) -> Operation:
    return backup_restore.boot_test(
        session,
        backup,
        project=project,
        pattern=group.pattern,
        tcp_port=group.tcp,
        timeout_s=group.timeout_s,
        pools=plan.pools,
        awaits_agent=group.awaits is not Awaits.STARTED,
        needs_agent=group.awaits is Awaits.AGENT,
        actor=actor,
        now=now,
    )


def find(session: Session, name: str, *, project: Project) -> RecoveryPlan:
    plan = recovery_plans.find(session, project.id, name)
    if plan is None:
        raise NotFound(
            "recovery-plan-not-found",
            f"there is no recovery plan {name} in project {project.name}; `trimtab recovery plan list` shows them",
            plan=name,
        )
    return plan


def get(session: Session, name: str, *, project: Project) -> PlanView:
    return views(session, (find(session, name, project=project),))[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[PlanView, ...], tuple[str, str] | None]:
    found, next_after = recovery_plans.page(session, page, project_id=project.id)
    return views(session, found), next_after


def views(session: Session, found: Sequence[RecoveryPlan]) -> tuple[PlanView, ...]:
    names = lookup.names_in(
        session,
        {schema.project: {one.project_id for one in found}, schema.backup_repo: {one.repo_id for one in found}},
    )
    return tuple(
        PlanView(
            plan=one,
            groups=recovery_runs.groups_of(one),
            project_name=names.get(one.project_id, ""),
            repo_name=names.get(one.repo_id, ""),
        )
        for one in found
    )
