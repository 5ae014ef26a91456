"""Routers: what lets overlay networks reach each other and the outside."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Address, Body, Ref, RefOrNone, RouterName
from trimtab_controller.api.mutate import NO_CONTENT, Order, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.overlay import RouterResource, render_router
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import networks, routers
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["routers"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]


class OuterWishBody(Body):
    """`outer`: the network of its outer side, "" for none; `outer_address`: of the network's range, the lowest free one unless given."""

    outer: RefOrNone = ""
    outer_address: Address = ""

    def wish(self) -> routers.OuterWish:
        return routers.OuterWish(network=self.outer, address=self.outer_address)


class RouterBody(OuterWishBody):
    name: RouterName
    networks: Annotated[tuple[Ref, ...], Field(max_length=50, examples=[["lab1"]])] = ()


class RouterNetworkBody(Body):
    network: Ref


@router.get("/v1/projects/{project}/routers", response_model=ListOf[RouterResource])
async def list_routers(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's routers; filter by name."""
    owner = access.own_project
    found, after = await runtime.context.db.read(lambda session: routers.page(session, query.page, project=owner))
    return json_response(dump_list(RouterResource, [render_router(one) for one in found], query.next_token(after)))


@router.post("/v1/projects/{project}/routers", status_code=201, response_model=RouterResource)
async def create_router(request: Request, access: ProjectOperator, body: RouterBody, asked: Asked) -> Response:
    """Make a router, with networks behind it and an outer side where they are named."""
    owner, has_overlay = access.own_project, request.app.state.runtime.context.settings.has_overlay

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        networks.require_overlay(has_overlay, field="name")
        view = routers.create(
            session, name=body.name, networks=body.networks, outer=body.wish(), project=owner, actor=actor, now=now
        )
        return answered(render_router(view), status=201, version=view.router.version)

    order = Order(request=request, access=access, wish=asked, verb="router.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/routers/{name}", response_model=RouterResource)
async def get_router(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    owner = access.own_project
    view = await runtime.context.db.read(lambda session: routers.get(session, name, project=owner))
    return json_response(dump(render_router(view)), etag=etag_of(view.router.version))


@router.patch("/v1/projects/{project}/routers/{name}", response_model=RouterResource)
async def change_router(request: Request, access: ProjectOperator, name: NamePath, body: OuterWishBody, asked: Asked) -> Response:
    """Give a router another outer side, or none."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = routers.change(session, name, body.wish(), project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return answered(render_router(view), version=view.router.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="router.change", body=body), work)


@router.post("/v1/projects/{project}/routers/{name}:attach", response_model=RouterResource)
async def attach_network(
    request: Request, access: ProjectOperator, name: NamePath, body: RouterNetworkBody, asked: Asked
) -> Response:
    """Put an overlay network of the project behind a router."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = routers.attach(session, name, body.network, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return answered(render_router(view), version=view.router.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="router.attach", body=body), work)


@router.post("/v1/projects/{project}/routers/{name}:detach", response_model=RouterResource)
async def detach_network(
    request: Request, access: ProjectOperator, name: NamePath, body: RouterNetworkBody, asked: Asked
) -> Response:
    """Take a network away from a router."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = routers.detach(session, name, body.network, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return answered(render_router(view), version=view.router.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="router.detach", body=body), work)


@router.delete("/v1/projects/{project}/routers/{name}", status_code=204, response_class=Response)
async def delete_router(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Delete a router that no network is behind."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        routers.delete(session, name, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="router.delete"), work)
