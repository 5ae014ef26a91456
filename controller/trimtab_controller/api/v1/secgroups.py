"""Security groups: what may reach the vms that are in them."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Name, Ref
from trimtab_controller.api.mutate import NO_CONTENT, Order, accepted, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.secgroups import SecGroupAnswer, SecGroupResource, render_secgroup
from trimtab_controller.api.security import requires
from trimtab_controller.api.v1.vm_verbs import run_verb
from trimtab_controller.core.firewall import GROUPS_MAX, RULES_MAX
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import secgroups, vm_devices
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["secgroups"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
RuleText = Annotated[str, Field(min_length=1, max_length=100, examples=["tcp/443"])]


class SecGroupChanges(Body):
    """These rules instead of those that it has: `tcp/443`, `udp/1000-2000@10.0.0.0/8`, `icmp` or `any`."""

    rules: Annotated[tuple[RuleText, ...], Field(max_length=RULES_MAX, examples=[["tcp/443", "tcp/22@10.0.0.0/8"]])]


class SecGroupBody(SecGroupChanges):
    name: Name


class VmSecGroupsBody(Body):
    """These groups and no others; none: anything may reach the vm."""

    secgroups: Annotated[tuple[Ref, ...], Field(max_length=GROUPS_MAX, examples=[["web"]])]


@router.get("/v1/projects/{project}/secgroups", response_model=ListOf[SecGroupResource])
async def list_secgroups(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's security groups; filter by name."""
    owner = access.own_project
    found, after = await runtime.context.db.read(lambda session: secgroups.page(session, query.page, project=owner))
    return json_response(dump_list(SecGroupResource, [render_secgroup(one) for one in found], query.next_token(after)))


@router.post("/v1/projects/{project}/secgroups", status_code=201, response_model=SecGroupResource)
async def create_secgroup(request: Request, access: ProjectOperator, body: SecGroupBody, asked: Asked) -> Response:
    """Make a security group."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = secgroups.create(session, name=body.name, rules=body.rules, project=owner, actor=actor, now=now)
        return answered(render_secgroup(view), status=201, version=view.group.version)

    order = Order(request=request, access=access, wish=asked, verb="secgroup.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/secgroups/{name}", response_model=SecGroupResource)
async def get_secgroup(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    owner = access.own_project
    view = await runtime.context.db.read(lambda session: secgroups.get(session, name, project=owner))
    return json_response(dump(render_secgroup(view)), etag=etag_of(view.group.version))


@router.patch("/v1/projects/{project}/secgroups/{name}", status_code=202, response_model=SecGroupAnswer)
async def change_secgroup(
    request: Request, access: ProjectOperator, name: NamePath, body: SecGroupChanges, asked: Asked
) -> Response:
    """Give a security group other rules; the operation ends when the hosts of its running vms follow them."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = secgroups.change(
            session, name, body.rules, project=owner, expected_version=asked.if_match, actor=actor, now=now
        )
        return accepted(SecGroupAnswer(operation=render(operation, project_name=owner.name), secgroup=render_secgroup(view)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="secgroup.change", body=body), work)


@router.delete("/v1/projects/{project}/secgroups/{name}", status_code=204, response_class=Response)
async def delete_secgroup(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Delete a security group without vms."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        secgroups.delete(session, name, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="secgroup.delete"), work)


@router.post("/v1/projects/{project}/vms/{name}:secgroups", status_code=202, response_model=OperationAnswer)
async def set_vm_secgroups(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: VmSecGroupsBody
) -> Response:
    """Put a vm into these security groups and no others; a running guest's packets are judged by them at once."""
    owner = access.own_project
    return await run_verb(
        request,
        access,
        name,
        asked,
        body,
        "vm.set_secgroups",
        lambda *parts: vm_devices.set_secgroups(*parts, names=body.secgroups, project=owner),
    )
