"""Pools: of the fleet."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Bool, Name, PoolPath
from trimtab_controller.api.mutate import Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.storage import PoolAnswer, PoolResource, render_pool
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import pools
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.pool_messages import NfsSource

router = APIRouter(tags=["pools"])
FleetViewer = Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]
FleetAdmin = Annotated[Access, requires(Role.ADMIN, Scope.FLEET)]


class PoolBody(Body):
    name: Name
    kind: Literal["dir", "nfs"] = "dir"
    # A directory of the hosts, or the export of an NFS server.
    path: PoolPath
    is_shared: Bool = False
    is_default: Bool = False
    # What placement leaves free, in thousandths.
    reserve_permille: Annotated[int, Field(strict=True, ge=0, le=900, examples=[50])] = 50
    # Of kind nfs.
    server: Annotated[str, Field(pattern=r"^([A-Za-z0-9:][A-Za-z0-9.:-]{0,252})?$", examples=["nas"])] = ""
    is_soft: Bool = False
    timeout_s: Annotated[int, Field(strict=True, ge=1, le=600, examples=[60])] = 60
    retries: Annotated[int, Field(strict=True, ge=1, le=100, examples=[2])] = 2
    nfs_version: Literal["3", "4.0", "4.1", "4.2"] = "4.2"

    def source(self) -> NfsSource | None:
        """Return what is mounted. InvalidRequest where a server is missing or not asked for."""
        if self.kind == "dir":
            if self.server:
                raise InvalidRequest("server-not-taken", "server: only a pool of kind nfs has a server", field="server")
            return None
        if not self.server:
            raise InvalidRequest("server-missing", "server: a pool of kind nfs needs one; for example nas", field="server")
        return NfsSource(
            server=self.server,
            export=self.path,
            is_soft=self.is_soft,
            timeout_s=self.timeout_s,
            retries=self.retries,
            version=self.nfs_version,
        )


@router.get("/v1/pools", response_model=ListOf[PoolResource])
async def list_pools(runtime: InRuntime, _access: FleetViewer, query: Listing) -> Response:
    """List pools with their state and space on each host; filter by name, kind, is_shared."""
    found, after = await runtime.context.db.read(lambda session: pools.page(session, query.page))
    return json_response(dump_list(PoolResource, [render_pool(one) for one in found], query.next_token(after)))


@router.post("/v1/pools", status_code=202, response_model=PoolAnswer)
async def create_pool(request: Request, access: FleetAdmin, body: PoolBody, asked: Asked) -> Response:
    """Make a pool on every host; a shared one takes volumes once each host has read a marker that another wrote."""
    spec = pools.PoolSpec(
        name=body.name,
        kind=body.kind,
        path=body.path,
        is_shared=body.is_shared,
        is_default=body.is_default,
        reserve_permille=body.reserve_permille,
        nfs=body.source(),
    )

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = pools.create(session, spec, actor=actor, now=now)
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
