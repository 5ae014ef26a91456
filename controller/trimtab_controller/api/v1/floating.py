"""Floating addresses: of an outer network, each leads to a vm on an overlay network."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Address, Body, NicRefOrNone, Ref
from trimtab_controller.api.mutate import NO_CONTENT, Order, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import AddressPath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.overlay import FloatingResource, render_floating
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import floating
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["floating-addresses"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]


class FloatingBody(Body):
    """`address`: of the network's range; the lowest free one unless given."""

    network: Ref
    address: Address = ""


class FloatingVmBody(Body):
    """`nic`: by id, MAC or index; otherwise the first one that a router leads to from the address's network."""

    vm: Ref
    nic: NicRefOrNone = ""


@router.get("/v1/projects/{project}/floating-addresses", response_model=ListOf[FloatingResource])
async def list_floating(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's floating addresses; filter by name."""
    owner = access.own_project
    found, after = await runtime.context.db.read(lambda session: floating.page(session, query.page, project=owner))
    return json_response(dump_list(FloatingResource, [render_floating(one) for one in found], query.next_token(after)))


@router.post("/v1/projects/{project}/floating-addresses", status_code=201, response_model=FloatingResource)
async def create_floating(request: Request, access: ProjectOperator, body: FloatingBody, asked: Asked) -> Response:
    """Take an address of an outer network; it counts in the project's quota until it is deleted."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = floating.create(session, network=body.network, address=body.address, project=owner, actor=actor, now=now)
        return answered(render_floating(view), status=201, version=view.floating.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="floating.create", body=body), work)


@router.get("/v1/projects/{project}/floating-addresses/{name}", response_model=FloatingResource)
async def get_floating(runtime: InRuntime, access: ProjectViewer, name: AddressPath) -> Response:
    owner = access.own_project
    view = await runtime.context.db.read(lambda session: floating.get(session, name, project=owner))
    return json_response(dump(render_floating(view)), etag=etag_of(view.floating.version))


@router.post("/v1/projects/{project}/floating-addresses/{name}:attach", response_model=FloatingResource)
async def attach_floating(
    request: Request, access: ProjectOperator, name: AddressPath, body: FloatingVmBody, asked: Asked
) -> Response:
    """Have the address lead to a vm, wherever that is."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = floating.attach(
            session, name, vm=body.vm, nic=body.nic, project=owner, expected_version=asked.if_match, actor=actor, now=now
        )
        return answered(render_floating(view), version=view.floating.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="floating.attach", body=body), work)


@router.post("/v1/projects/{project}/floating-addresses/{name}:detach", response_model=FloatingResource)
async def detach_floating(request: Request, access: ProjectOperator, name: AddressPath, asked: Asked) -> Response:
    """Have the address lead to nobody; it stays the project's."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = floating.detach(session, name, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return answered(render_floating(view), version=view.floating.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="floating.detach"), work)


@router.delete("/v1/projects/{project}/floating-addresses/{name}", status_code=204, response_class=Response)
async def delete_floating(request: Request, access: ProjectOperator, name: AddressPath, asked: Asked) -> Response:
    """Give an address back that leads to nobody."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        floating.delete(session, name, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="floating.delete"), work)
