"""Networks: of a project, and shared ones."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import (
    Address4,
    AddressOrNone,
    BareAddress,
    Body,
    Bool,
    BridgeName,
    BridgeOrNone,
    HostName,
    Name,
    Part,
    RouterOrNone,
    Subnet,
    Subnet6,
)
from trimtab_controller.api.mutate import Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.storage import NetworkAnswer, NetworkResource, render_network
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.core.overlay import DEFAULT_MTU
from trimtab_controller.services import networks
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["networks"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
Anyone = Annotated[Access, requires(Role.VIEWER, Scope.SELF)]
FleetAdmin = Annotated[Access, requires(Role.ADMIN, Scope.FLEET)]


class OuterBody(Part):
    """The way out of overlay networks: its router, and the addresses there that are to be given, from first to last."""

    gateway: Address4
    first: Address4
    last: Address4


class NetworkBody(Body):
    """`bridge` (and `bridges` by host) for kind bridge, `subnet` for nat, isolated and overlay, whose `mtu` is 1442 by default.

    `subnet6` of an overlay network: guests make their addresses in it (`ipv6` slaac), or are given them (dhcp). `gateway` and `dns` of
    a network on a bridge with a subnet: its LAN's router and DNS servers, which the seeds of its guests say with their addresses.
    """

    name: Name
    kind: Literal["bridge", "nat", "isolated", "overlay"]
    bridge: BridgeOrNone = ""
    bridges: Annotated[dict[HostName, BridgeName], Field(max_length=1000, examples=[{"node1": "br0"}])] = Field(
        default_factory=dict
    )
    vlan: Annotated[int, Field(strict=True, ge=0, le=4094, examples=[120])] = 0
    mtu: Annotated[int, Field(strict=True, ge=576, le=65535, examples=[1500])] = 1500
    subnet: Subnet = ""
    subnet6: Subnet6 = ""
    ipv6: Literal["slaac", "dhcp"] = "slaac"
    dhcp: Bool = False
    router: RouterOrNone = ""
    outer: OuterBody | None = None
    gateway: AddressOrNone = ""
    dns: Annotated[list[BareAddress], Field(max_length=networks.DNS_MAX, examples=[["192.0.2.53"]])] = Field(default_factory=list)

    def spec(self) -> networks.NetworkSpec:
        return networks.NetworkSpec(
            name=self.name,
            kind=self.kind,
            bridge=self.bridge,
            bridges=self.bridges,
            vlan=self.vlan,
            mtu=self.mtu if self.kind != "overlay" or "mtu" in self.model_fields_set else DEFAULT_MTU,
            subnet=self.subnet,
            has_dhcp=self.dhcp,
            subnet6=self.subnet6,
            has_dhcp6=self.ipv6 == "dhcp",
            router=self.router,
            outer=(
                networks.OuterSpec(gateway=self.outer.gateway, first=self.outer.first, last=self.outer.last)
                if self.outer
                else None
            ),
            gateway=self.gateway,
            dns=tuple(self.dns),
        )


@router.get("/v1/projects/{project}/networks", response_model=ListOf[NetworkResource])
async def list_networks(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's networks and the shared ones; filter by name, kind."""
    return await _list(runtime, access, query)


@router.post("/v1/projects/{project}/networks", status_code=202, response_model=NetworkAnswer)
async def create_network(request: Request, access: ProjectOperator, body: NetworkBody, asked: Asked) -> Response:
    """Make a network of the project; one on a bridge takes an administrator of the fleet."""
    return await _create(
        Order(request=request, access=access, wish=asked, verb="network.create", body=body, name=body.name), body
    )


@router.get("/v1/projects/{project}/networks/{name}", response_model=NetworkResource)
async def get_network(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    return await _get(runtime, access, name)


@router.delete("/v1/projects/{project}/networks/{name}", status_code=202, response_model=OperationAnswer)
async def delete_network(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Remove a network that no vm uses."""
    return await _delete(Order(request=request, access=access, wish=asked, verb="network.delete"), name)


@router.get("/v1/networks", response_model=ListOf[NetworkResource])
async def list_shared_networks(runtime: InRuntime, access: Anyone, query: Listing) -> Response:
    """List the networks that every project may use."""
    return await _list(runtime, access, query)


@router.post("/v1/networks", status_code=202, response_model=NetworkAnswer)
async def create_shared_network(request: Request, access: FleetAdmin, body: NetworkBody, asked: Asked) -> Response:
    return await _create(
        Order(request=request, access=access, wish=asked, verb="network.create", body=body, name=body.name), body
    )


@router.get("/v1/networks/{name}", response_model=NetworkResource)
async def get_shared_network(runtime: InRuntime, access: Anyone, name: NamePath) -> Response:
    return await _get(runtime, access, name)


@router.delete("/v1/networks/{name}", status_code=202, response_model=OperationAnswer)
async def delete_shared_network(request: Request, access: FleetAdmin, name: NamePath, asked: Asked) -> Response:
    return await _delete(Order(request=request, access=access, wish=asked, verb="network.delete"), name)


async def _list(runtime: Runtime, access: Access, query: Listing) -> Response:
    found, after = await runtime.context.db.read(lambda session: networks.page(session, query.page, project=access.project))
    return json_response(dump_list(NetworkResource, [render_network(one) for one in found], query.next_token(after)))


async def _get(runtime: Runtime, access: Access, name: str) -> Response:
    view = await runtime.context.db.read(lambda session: networks.get(session, name, project=access.project))
    return json_response(dump(render_network(view)), etag=etag_of(view.network.version))


async def _create(order: Order, body: NetworkBody) -> Response:
    project, has_overlay = order.access.project, order.request.app.state.runtime.context.settings.has_overlay

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = networks.create(session, body.spec(), project=project, actor=actor, now=now, has_overlay=has_overlay)
        shown = render(operation, project_name=project.name if project else "")
        return accepted(NetworkAnswer(operation=shown, network=render_network(view)))

    return await mutate(order, work)


async def _delete(order: Order, name: str) -> Response:
    project = order.access.project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = networks.delete(session, name, project=project, expected_version=order.wish.if_match, actor=actor, now=now)
        project_name = project.name if project and operation.project_id else ""
        return accepted(OperationAnswer(operation=render(operation, project_name=project_name)))

    return await mutate(order, work)
