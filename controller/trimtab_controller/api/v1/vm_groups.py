"""Vm groups: which vms share a failure domain, and which do not."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Bool, LabelKey, Name, Part
from trimtab_controller.api.mutate import NO_CONTENT, Order, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.vm_groups import VmGroupResource, render_vm_group
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.core.placement.needs import GroupRule, Relation
from trimtab_controller.services import vm_groups
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["vm-groups"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]


class GroupRuleBody(Part):
    """`domain` is a label of hosts, each value of which is a failure domain; `host` makes each host one.

    `must` false is a wish. `limit`: how many members a domain may hold, for anti-affinity.
    """

    relation: Literal["affinity", "anti-affinity"]
    domain: Annotated[LabelKey, Field(examples=["rack"])] = "host"
    must: Bool = True
    limit: Annotated[int, Field(strict=True, ge=1, le=10_000, examples=[1])] = 1

    def rule(self) -> GroupRule:
        return GroupRule(relation=Relation(self.relation), domain=self.domain, is_must=self.must, limit=self.limit)


class VmGroupChanges(Body):
    """These rules instead of those that it has."""

    rules: Annotated[
        tuple[GroupRuleBody, ...],
        Field(min_length=1, max_length=8, examples=[[{"relation": "anti-affinity", "domain": "rack"}]]),
    ]


class VmGroupBody(VmGroupChanges):
    name: Name


@router.get("/v1/projects/{project}/vm-groups", response_model=ListOf[VmGroupResource])
async def list_vm_groups(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's vm groups; filter by name."""
    owner = access.own_project
    found, after = await runtime.context.db.read(lambda session: vm_groups.page(session, query.page, project=owner))
    return json_response(dump_list(VmGroupResource, [render_vm_group(one) for one in found], query.next_token(after)))


@router.post("/v1/projects/{project}/vm-groups", status_code=201, response_model=VmGroupResource)
async def create_vm_group(request: Request, access: ProjectOperator, body: VmGroupBody, asked: Asked) -> Response:
    """Make a vm group; vms join it when they are created."""
    owner, rules = access.own_project, tuple(one.rule() for one in body.rules)

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = vm_groups.create(session, name=body.name, rules=rules, project=owner, actor=actor, now=now)
        return answered(render_vm_group(view), status=201, version=view.group.version)

    order = Order(request=request, access=access, wish=asked, verb="vm-group.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/vm-groups/{name}", response_model=VmGroupResource)
async def get_vm_group(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    owner = access.own_project
    view = await runtime.context.db.read(lambda session: vm_groups.get(session, name, project=owner))
    return json_response(dump(render_vm_group(view)), etag=etag_of(view.group.version))


@router.patch("/v1/projects/{project}/vm-groups/{name}", response_model=VmGroupResource)
async def change_vm_group(
    request: Request, access: ProjectOperator, name: NamePath, body: VmGroupChanges, asked: Asked
) -> Response:
    """Give a vm group other rules; its members stay where they are until they are placed again."""
    owner, rules = access.own_project, tuple(one.rule() for one in body.rules)

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = vm_groups.change(session, name, rules, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return answered(render_vm_group(view), version=view.group.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="vm-group.change", body=body), work)


@router.delete("/v1/projects/{project}/vm-groups/{name}", status_code=204, response_class=Response)
async def delete_vm_group(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Delete a vm group without members."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        vm_groups.delete(session, name, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="vm-group.delete"), work)
