"""Backups of several vms of a project at one instant."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Bool, Name, Ref, RefOrNone
from trimtab_controller.api.mutate import Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, json_response
from trimtab_controller.api.resources.backup_instants import (
    BackupInstantAnswer,
    BackupInstantResource,
    InstantRestoreAnswer,
    render_instant,
)
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import render
from trimtab_controller.api.v1.backups import Mib, NewestFirst, ProjectOperator, ProjectViewer, Renamed
from trimtab_controller.core.model import Actor
from trimtab_controller.services import backup_instants
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["backups"])
Pattern = Annotated[str, Field(pattern=r"^[a-z0-9{}-]{1,63}$", max_length=63, examples=["{vm}-again"])]


class InstantBody(Body):
    """Vms by name, or all of a policy."""

    name: Name
    vms: Annotated[list[Ref], Field(max_length=64, examples=[["db", "web"]])] = Field(default_factory=list)
    policy: RefOrNone = ""
    repo: RefOrNone = ""
    needs_filesystem: Bool = False
    needs_application: Bool = False
    bandwidth_mib_s: Mib = 0


class RestoreInstantBody(Body):
    name_pattern: Pattern = "{vm}"
    to_host: RefOrNone = ""
    pools: Renamed = Field(default_factory=dict)
    networks: Renamed = Field(default_factory=dict)
    start: Bool = True
    # Also where the members have no moment in common.
    allow_broken: Bool = False


@router.get("/v1/projects/{project}/backup-instants", response_model=ListOf[BackupInstantResource])
async def list_backup_instants(runtime: InRuntime, access: ProjectViewer, query: NewestFirst) -> Response:
    """List instants, newest first; filter by name, state."""
    project = access.own_project
    found, after = await runtime.context.db.read(lambda session: backup_instants.page(session, query.page, project=project))
    items = [render_instant(one) for one in found]
    return json_response(dump_list(BackupInstantResource, items, query.next_token(after)))


@router.post("/v1/projects/{project}/backup-instants", status_code=202, response_model=BackupInstantAnswer)
async def create_backup_instant(request: Request, access: ProjectOperator, body: InstantBody, asked: Asked) -> Response:
    """Back several vms up as they are at one moment, also across hosts."""
    project = access.own_project
    spec = backup_instants.InstantSpec(
        name=body.name,
        vms=body.vms,
        policy=body.policy,
        repo=body.repo,
        needs_filesystem=body.needs_filesystem,
        needs_application=body.needs_application,
        bandwidth_mib_s=body.bandwidth_mib_s,
    )

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = backup_instants.create(session, spec, project=project, actor=actor, now=now)
        shown = render(operation, project_name=project.name)
        return accepted(BackupInstantAnswer(operation=shown, instant=render_instant(view)))

    order = Order(request=request, access=access, wish=asked, verb="backup.together", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/backup-instants/{name}", response_model=BackupInstantResource)
async def get_backup_instant(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    project = access.own_project
    view = await runtime.context.db.read(lambda session: backup_instants.get(session, name, project=project))
    return json_response(dump(render_instant(view)))


@router.post("/v1/projects/{project}/backup-instants/{name}:restore", status_code=202, response_model=InstantRestoreAnswer)
async def restore_backup_instant(
    request: Request, access: ProjectOperator, name: NamePath, body: RestoreInstantBody, asked: Asked
) -> Response:
    """Bring every member back as a new vm, all as they were at the instant."""
    project = access.own_project
    spec = backup_instants.RestoreAllSpec(
        name_pattern=body.name_pattern,
        to_host=body.to_host,
        pools=body.pools,
        networks=body.networks,
        start=body.start,
        allow_broken=body.allow_broken,
    )

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operations = backup_instants.restore(session, name, spec, project=project, actor=actor, now=now)
        shown = tuple(render(one, project_name=project.name) for one in operations)
        return accepted(InstantRestoreAnswer(instant=render_instant(view), operations=shown))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup.restore_together", body=body), work)
