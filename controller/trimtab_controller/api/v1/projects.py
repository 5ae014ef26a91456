"""Projects and their quotas."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import ConfigDict
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Name, Part, Quota
from trimtab_controller.api.mutate import NO_CONTENT, Order, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import ProjectPath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.identity import ProjectResource, render_project
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import projects
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["projects"])
FleetAdmin = Annotated[Access, requires(Role.ADMIN, Scope.FLEET)]


class Quotas(Part):
    """Left out: unlimited in a new project, unchanged in a change. null: unlimited."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"vms": 100}]})

    vms: Quota | None = None
    vcpus: Quota | None = None
    memory_mib: Quota | None = None
    disk_bytes: Quota | None = None
    snapshots: Quota | None = None
    floating: Quota | None = None

    def columns(self) -> dict[str, int | None]:
        """Return what was given, by column."""
        return {f"{name}_quota": getattr(self, name) for name in self.model_fields_set}


class ProjectBody(Body):
    name: Name
    quotas: Quotas = Quotas()


class ProjectChanges(Body):
    quotas: Quotas


@router.get("/v1/projects", response_model=ListOf[ProjectResource])
async def list_projects(
    runtime: InRuntime, access: Annotated[Access, requires(Role.VIEWER, Scope.SELF)], query: Listing
) -> Response:
    """List the projects in which the caller has a role."""
    found, after = await runtime.context.db.read(lambda session: projects.page(session, query.page, actor=access.actor))
    return json_response(dump_list(ProjectResource, [render_project(one) for one in found], query.next_token(after)))


@router.post("/v1/projects", status_code=201, response_model=ProjectResource)
async def create_project(request: Request, access: FleetAdmin, body: ProjectBody, asked: Asked) -> Response:
    spec = projects.ProjectSpec(name=body.name, quotas=body.quotas.columns())

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        project = projects.create(session, spec, actor=actor, now=now)
        return answered(render_project(project), status=201, version=project.version)

    order = Order(request=request, access=access, wish=asked, verb="project.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}", response_model=ProjectResource)
async def get_project(
    runtime: InRuntime, access: Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)], project: ProjectPath
) -> Response:
    found = await runtime.context.db.read(lambda session: projects.get(session, access.project_id or project))
    return json_response(dump(render_project(found)), etag=etag_of(found.version))


@router.patch("/v1/projects/{project}", response_model=ProjectResource)
async def change_project(
    request: Request, access: FleetAdmin, project: ProjectPath, body: ProjectChanges, asked: Asked
) -> Response:
    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        changed = projects.update(
            session,
            projects.get(session, project),
            body.quotas.columns(),
            expected_version=asked.if_match,
            actor=actor,
            now=now,
        )
        return answered(render_project(changed), version=changed.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="project.change", body=body), work)


@router.delete("/v1/projects/{project}", status_code=204, response_class=Response)
async def delete_project(request: Request, access: FleetAdmin, project: ProjectPath, asked: Asked) -> Response:
    """Delete an empty project."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        found = projects.get(session, project)
        projects.delete(session, found, expected_version=asked.if_match, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="project.delete"), work)
