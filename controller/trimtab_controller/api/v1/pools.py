"""Pools: of the fleet."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.mutate import Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.pool_bodies import PoolBody
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.storage import PoolAnswer, PoolResource, render_pool
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import pools
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["pools"])
FleetViewer = Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]
FleetAdmin = Annotated[Access, requires(Role.ADMIN, Scope.FLEET)]


@router.get("/v1/pools", response_model=ListOf[PoolResource])
async def list_pools(runtime: InRuntime, _access: FleetViewer, query: Listing) -> Response:
    """List pools with their state and space on each host; filter by name, kind, is_shared."""
    found, after = await runtime.context.db.read(lambda session: pools.page(session, query.page))
    return json_response(dump_list(PoolResource, [render_pool(one) for one in found], query.next_token(after)))


@router.post("/v1/pools", status_code=202, response_model=PoolAnswer)
async def create_pool(request: Request, runtime: InRuntime, access: FleetAdmin, body: PoolBody, asked: Asked) -> Response:
    """Make a pool on every host; a shared one takes volumes once each host has read a marker that another wrote."""
    spec = pools.PoolSpec(
        name=body.name,
        kind=body.kind,
        path=body.path,
        is_shared=body.is_shared,
        is_default=body.is_default,
        reserve_permille=body.reserve_permille,
        nfs=body.nfs_source(),
        behind=body.behind(),
        secret=body.secret,
    )
    box = runtime.context.secrets

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = pools.create(session, spec, actor=actor, now=now, box=box)
        return accepted(PoolAnswer(operation=render(operation, project_name=""), pool=render_pool(view)))

    order = Order(request=request, access=access, wish=asked, verb="pool.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/pools/{name}", response_model=PoolResource)
async def get_pool(runtime: InRuntime, _access: FleetViewer, name: NamePath) -> Response:
    view = await runtime.context.db.read(lambda session: pools.get(session, name))
    return json_response(dump(render_pool(view)), etag=etag_of(view.pool.version))


@router.delete("/v1/pools/{name}", status_code=202, response_model=OperationAnswer)
async def delete_pool(request: Request, access: FleetAdmin, name: NamePath, asked: Asked) -> Response:
    """Remove an empty pool."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = pools.delete(session, name, expected_version=asked.if_match, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="pool.delete"), work)
