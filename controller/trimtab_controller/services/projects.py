"""Projects: tenants with quotas."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Project
from trimtab_controller.services.authorise import visible_projects
from trimtab_controller.store import events, identity, keyset
from trimtab_protos.errors import Conflict, NotFound

QUOTA_COLUMNS = ("vms_quota", "vcpus_quota", "memory_mib_quota", "disk_bytes_quota", "snapshots_quota", "floating_quota")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectSpec:
    name: str
    # By column of QUOTA_COLUMNS; None is unlimited.
    quotas: Mapping[str, int | None]


def create(session: Session, spec: ProjectSpec, *, actor: Actor, now: datetime) -> Project:
    """Return the new project. AlreadyExists where the name is taken."""
    project = identity.insert_project(session, project_id=mint("proj"), name=spec.name, quotas=spec.quotas, now=now)
    _tell(session, project, "created", actor, now)
    return project


def update(
    session: Session,
    project: Project,
    quotas: Mapping[str, int | None],
    *,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> Project:
    """Return the project with its new quotas; one below what is used only stops growth."""
    identity.update_project(session, project.id, expected_version=expected_version, quotas=quotas)
    _tell(session, project, "changed", actor, now)
    return get(session, project.id)


def delete(session: Session, project: Project, *, expected_version: int | None, actor: Actor, now: datetime) -> None:
    """Delete an empty project. Conflict names what is still in it."""
    contents = identity.project_contents(session, project.id)
    if contents:
        listed = "; ".join(f"{noun}{'es' if noun.endswith('s') else 's'} {', '.join(names)}" for noun, names in contents.items())
        raise Conflict(
            "project-not-empty",
            f"project {project.name} still has {listed} (deleted vms count for 24 h, or until `trimtab vm purge`)",
        )
    identity.delete_project(session, project.id, expected_version=expected_version, now=now)
    _tell(session, project, "deleted", actor, now)


def get(session: Session, name_or_id: str) -> Project:
    project = identity.find_project(session, name_or_id)
    if project is None:
        raise NotFound("project-not-found", f"there is no project {name_or_id}", project=name_or_id)
    return project


def page(session: Session, page: keyset.Page, *, actor: Actor) -> tuple[tuple[Project, ...], tuple[str, str] | None]:
    """Return the projects in which the actor has a role."""
    return identity.projects_page(session, page, project_ids=visible_projects(actor))


def _tell(session: Session, project: Project, what: str, actor: Actor, now: datetime) -> None:
    events.append(
        session,
        kind=f"project.{what}",
        project_id=project.id,
        subject_id=project.id,
        actor=actor.name,
        message=f"project {project.name} {what}",
        now=now,
    )
