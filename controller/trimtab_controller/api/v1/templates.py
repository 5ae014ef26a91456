"""Templates, the vms made of them, and clones of vms."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import HOST_NAME_PATTERN, Body, Bool, Name, Ref, RefOrNone
from trimtab_controller.api.mutate import Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, OperationResource, render
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import clones, templates, vm_power
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_controller.services.vm_power import Caller

router = APIRouter(tags=["templates"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
TemplatePath = Annotated[
    str, Path(pattern=HOST_NAME_PATTERN, max_length=63, examples=["web"], description="Name or id of the template.")
]
RevisionQuery = Annotated[int, Query(ge=0, le=1_000_000, examples=[1], description="Which revision; 0: the newest.")]
_TEMPLATES = "/v1/projects/{project}/templates"


class CloneBody(Body):
    """`linked` shares the source's disks below what the clone writes; else they are copied. '' takes a snapshot now."""

    name: Name
    linked: Bool = False
    snapshot: RefOrNone = ""
    start: Bool = True


class TemplateBody(Body):
    """The next revision of `name`, from a vm as it is now, running or stopped."""

    name: Name
    from_vm: Ref


class TemplateVmsBody(Body):
    """`count` vms called by `name_pattern`, in which `{n}` is their number, from `first` on; the scheduler spreads them."""

    name_pattern: Annotated[str, Field(pattern=r"^[a-z][a-z0-9{}-]{0,62}$", max_length=63, examples=["web-{n}"])]
    count: Annotated[int, Field(strict=True, ge=1, le=templates.COUNT_MAX, examples=[20])] = 1
    first: Annotated[int, Field(strict=True, ge=0, le=1_000_000, examples=[1])] = 1
    revision: Annotated[int, Field(strict=True, ge=0, le=1_000_000, examples=[1])] = 0
    pool: RefOrNone = ""
    to_host: RefOrNone = ""
    start: Bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateResource:
    id: str
    name: str
    project: str
    revision: int
    image: str
    # importing, ready or failed: of the image.
    state: str
    vcpus: int
    memory_mib: int
    disk_bytes: int
    stored_bytes: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateAnswer:
    operation: OperationResource
    template: TemplateResource


def _render(view: templates.TemplateView) -> TemplateResource:
    template, settings = view.template, view.template.settings
    return TemplateResource(
        id=template.id,
        name=template.name,
        project=view.project_name,
        revision=template.revision,
        image=view.image.name,
        state=view.image.state,
        vcpus=int(settings.get("vcpus", 0)),
        memory_mib=int(settings.get("memory_mib", 0)),
        disk_bytes=int(settings.get("disk_bytes", 0)),
        stored_bytes=view.image.file_size_bytes,
        created_at=template.created_at,
    )


@router.post("/v1/projects/{project}/vms/{name}:clone", status_code=202, response_model=OperationAnswer)
async def clone_vm(request: Request, access: ProjectOperator, name: NamePath, body: CloneBody, asked: Asked) -> Response:
    """Make another vm like this one, running or stopped, under an identity of its own."""
    owner = access.own_project
    spec = clones.CloneSpec(name=body.name, is_linked=body.linked, snapshot=body.snapshot, start=body.start)

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        vm = vm_power.find(session, name, project=owner)
        caller = Caller(actor=actor, expected_version=asked.if_match, now=now)
        _view, operation = clones.clone(session, vm, caller, spec, project=owner)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="vm.clone", body=body), work)


@router.get(_TEMPLATES, response_model=ListOf[TemplateResource])
async def list_templates(runtime: InRuntime, access: ProjectViewer) -> Response:
    """List the project's templates, every revision; a project has few, so there are no pages."""
    owner = access.own_project
    found = await runtime.context.db.read(lambda session: templates.page(session, project=owner))
    return json_response(dump_list(TemplateResource, [_render(one) for one in found], ""))


@router.post(_TEMPLATES, status_code=202, response_model=TemplateAnswer)
async def create_template(request: Request, access: ProjectOperator, body: TemplateBody, asked: Asked) -> Response:
    """Make a template of a vm: its settings, and an image of its boot disk. The vm runs on."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        vm = vm_power.find(session, body.from_vm, project=owner)
        caller = Caller(actor=actor, expected_version=asked.if_match, now=now)
        view, operation = templates.create(session, vm, caller, name=body.name, project=owner)
        return accepted(TemplateAnswer(operation=render(operation, project_name=owner.name), template=_render(view)))

    order = Order(request=request, access=access, wish=asked, verb="template.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get(f"{_TEMPLATES}/{{template}}", response_model=TemplateResource)
async def get_template(
    runtime: InRuntime, access: ProjectViewer, template: TemplatePath, revision: RevisionQuery = 0
) -> Response:
    owner = access.own_project

    def read(session: Session) -> TemplateResource:
        found = templates.find(session, template, project=owner, revision=revision)
        return _render(templates.view(session, found, project=owner))

    return json_response(dump(await runtime.context.db.read(read)))


@router.post(f"{_TEMPLATES}/{{template}}:create-vms", status_code=202, response_model=OperationAnswer)
async def create_template_vms(
    request: Request, access: ProjectOperator, template: TemplatePath, body: TemplateVmsBody, asked: Asked
) -> Response:
    """Make vms of a template, all of them or none accepted; the answer is the operation that follows them."""
    owner = access.own_project
    spec = templates.VmsSpec(
        name_pattern=body.name_pattern,
        count=body.count,
        first=body.first,
        revision=body.revision,
        pool=body.pool,
        to_host=body.to_host,
        start=body.start,
    )

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = templates.create_vms(session, template, spec, project=owner, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="template.create-vms", body=body), work)


@router.delete(f"{_TEMPLATES}/{{template}}", status_code=202, response_model=OperationAnswer)
async def delete_template(
    request: Request, access: ProjectOperator, template: TemplatePath, asked: Asked, revision: RevisionQuery = 0
) -> Response:
    """Remove a revision with its image, unless a vm made of it is there or may come back."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = templates.delete(session, template, revision=revision, project=owner, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="template.delete"), work)
