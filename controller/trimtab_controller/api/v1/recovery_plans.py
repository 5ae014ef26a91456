"""Recovery plans of a project: ordered groups of vms that come back from a repository."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Name, Part, Ref, RefOrNone
from trimtab_controller.api.mutate import NO_CONTENT, Order, accepted, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.recovery_plans import (
    RecoveryPlanResource,
    RecoveryRunResource,
    render_plan,
    render_preview,
)
from trimtab_controller.api.v1.backups import CpuModelOrAuto, ProjectOperator, ProjectViewer, Renamed, TcpPort
from trimtab_controller.core.model import Actor
from trimtab_controller.core.recovery_plans import Awaits, Group, Mode
from trimtab_controller.services import recovery_plans
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["backups"])


class GroupPart(Part):
    name: Name
    vms: Annotated[list[Ref], Field(min_length=1, max_length=500, examples=[["db"]])]
    delay_s: Annotated[int, Field(strict=True, ge=0, le=86400, examples=[30])] = 0
    awaits: Awaits = Awaits.STARTED
    pattern: Annotated[str, Field(pattern=r"^[ -~]*$", max_length=200, examples=["login:"])] = ""
    # Where its boot test is answered; a real run does not ask for it. 0: nowhere.
    tcp: TcpPort = 0
    timeout_s: Annotated[int, Field(strict=True, ge=1, le=3600, examples=[300])] = 300

    def group(self) -> Group:
        return Group(
            name=self.name,
            vms=self.vms,
            delay_s=self.delay_s,
            awaits=self.awaits,
            pattern=self.pattern,
            tcp=self.tcp,
            timeout_s=self.timeout_s,
        )


class RecoveryPlanBody(Body):
    name: Name
    repo: RefOrNone = ""
    groups: Annotated[list[GroupPart], Field(min_length=1, max_length=50, examples=[[{"name": "data", "vms": ["db"]}]])]
    networks: Renamed = Field(default_factory=dict)
    pools: Renamed = Field(default_factory=dict)
    cpu_model: CpuModelOrAuto = "auto"


class ImportBody(Body):
    """A plan that the repository's backups know. What is renamed here goes before what the plan itself says."""

    name: Name
    repo: RefOrNone = ""
    networks: Renamed = Field(default_factory=dict)
    pools: Renamed = Field(default_factory=dict)


class RunBody(Body):
    # test: each vm boots without a network, and nothing of it stays. real: they come back.
    mode: Mode = Mode.TEST


@router.get("/v1/projects/{project}/recovery-plans", response_model=ListOf[RecoveryPlanResource])
async def list_recovery_plans(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's recovery plans; filter by name, repo."""
    owner = access.own_project
    found, after = await runtime.context.db.read(lambda session: recovery_plans.page(session, query.page, project=owner))
    return json_response(dump_list(RecoveryPlanResource, [render_plan(one) for one in found], query.next_token(after)))


@router.post("/v1/projects/{project}/recovery-plans", status_code=201, response_model=RecoveryPlanResource)
async def create_recovery_plan(request: Request, access: ProjectOperator, body: RecoveryPlanBody, asked: Asked) -> Response:
    owner = access.own_project
    spec = recovery_plans.PlanSpec(
        name=body.name,
        groups=[one.group() for one in body.groups],
        repo=body.repo,
        networks=body.networks,
        pools=body.pools,
        cpu_model=body.cpu_model,
    )

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        view = recovery_plans.create(session, spec, project=owner, now=now)
        return answered(render_plan(view), status=201, version=view.plan.version)

    order = Order(request=request, access=access, wish=asked, verb="recovery_plan.create", body=body, name=body.name)
    return await mutate(order, work)


@router.post("/v1/projects/{project}/recovery-plans:import", status_code=201, response_model=RecoveryPlanResource)
async def import_recovery_plan(request: Request, access: ProjectOperator, body: ImportBody, asked: Asked) -> Response:
    """Write a plan down as the newest backup that knows it says it: on a fleet that has the repository and its key alone."""
    owner = access.own_project
    spec = recovery_plans.PlanSpec(name=body.name, groups=(), repo=body.repo, networks=body.networks, pools=body.pools)

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        view = recovery_plans.import_from(session, spec, project=owner, now=now)
        return answered(render_plan(view), status=201, version=view.plan.version)

    order = Order(request=request, access=access, wish=asked, verb="recovery_plan.import", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/recovery-plans/{name}", response_model=RecoveryPlanResource)
async def get_recovery_plan(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    owner = access.own_project
    view = await runtime.context.db.read(lambda session: recovery_plans.get(session, name, project=owner))
    return json_response(dump(render_plan(view)), etag=etag_of(view.plan.version))


@router.get("/v1/projects/{project}/recovery-plans/{name}/preview", response_model=RecoveryRunResource)
async def preview_recovery_plan(runtime: InRuntime, access: ProjectViewer, name: NamePath, mode: Mode = Mode.REAL) -> Response:
    """Show what a run would bring back now, from which backup, and what each vm would lose."""
    owner, now = access.own_project, runtime.context.clock.now()
    _view, run = await runtime.context.db.read(
        lambda session: recovery_plans.preview(session, name, mode=mode, project=owner, now=now)
    )
    return json_response(dump(render_preview(run, mode=mode.value)))


@router.post("/v1/projects/{project}/recovery-plans/{name}:run", status_code=202, response_model=OperationAnswer)
async def run_recovery_plan(request: Request, access: ProjectOperator, name: NamePath, body: RunBody, asked: Asked) -> Response:
    """Bring the groups back in their order, or test whether they would come back."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = recovery_plans.run(session, name, mode=body.mode, project=owner, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="recovery_plan.run", body=body), work)


@router.delete("/v1/projects/{project}/recovery-plans/{name}", status_code=204)
async def delete_recovery_plan(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Remove a plan; what it brought back stays."""
    owner = access.own_project

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        recovery_plans.delete(session, name, project=owner, expected_version=asked.if_match, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="recovery_plan.delete"), work)
