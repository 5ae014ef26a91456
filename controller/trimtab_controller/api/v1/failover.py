"""Failover: losses of hosts, what it is doing, operators' words to it; and hosts' power devices."""

import asyncio
import contextlib
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Name, Part
from trimtab_controller.api.lists import PAGE_SIZE, FilterText, PageSize, PageToken, parse
from trimtab_controller.api.mutate import NO_CONTENT, Order, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.failover import (
    DrillResource,
    FailoverResource,
    FailoverStatusResource,
    FencePathsResource,
    render_drill,
    render_failover,
    render_paths,
    render_status,
)
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import requires
from trimtab_controller.core.failover import FailoverSettings
from trimtab_controller.core.failover.drill import Assumptions, Drill
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.fencing import SECRET_MAX, FencePath
from trimtab_controller.services import behind, drills, failover_view, fencing, hosts_admin, recovery, survival
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_protos.errors import TrimtabError

router = APIRouter(tags=["failover"])
FleetViewer = Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]
FleetOperator = Annotated[Access, requires(Role.OPERATOR, Scope.FLEET)]
FleetAdmin = Annotated[Access, requires(Role.ADMIN, Scope.FLEET)]
FailoverPath = Annotated[str, Path(pattern=r"^fo-[0-9a-z]{26}$", examples=["fo-01hf7y2m3n4p5q6r7s8t9v0wxy"])]

BootSeconds = Annotated[
    float, Query(ge=0.1, le=600, examples=[5.0], description="What a guest's start is assumed to take on its new host.")
]


class ReasonBody(Body):
    reason: Annotated[str, Field(min_length=1, max_length=recovery.REASON_MAX, pattern=r"\S", examples=["pulled the plug"])]


class FencePathBody(Part):
    """`secret` is encrypted where it is kept and never shown; left out, the device keeps the one it had."""

    name: Name
    agent: Annotated[str, Field(pattern=r"^fence_[a-z0-9_]{1,40}$", examples=["fence_redfish"])]
    options: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$", examples=["ip"])],
            Annotated[str, Field(max_length=400, examples=["192.0.2.31"])],
        ],
        Field(max_length=32, examples=[{"ip": "192.0.2.31", "username": "root"}]),
    ] = Field(default_factory=dict)
    # Excluded from what a request id stands for: no row may hold even a digest of it.
    secret: Annotated[str, Field(max_length=SECRET_MAX, exclude=True, examples=["a-long-password"])] = ""

    def path(self) -> FencePath:
        return FencePath(name=self.name, agent=self.agent, options=self.options, secret=self.secret)


class FencePathsBody(Body):
    """The devices in the order in which they are tried; they replace what was there."""

    paths: Annotated[
        list[FencePathBody], Field(max_length=fencing.PATHS_MAX, examples=[[{"name": "bmc", "agent": "fence_redfish"}]])
    ]


@router.get("/v1/failovers", response_model=ListOf[FailoverResource])
async def list_failovers(
    request: Request,
    runtime: InRuntime,
    _access: FleetViewer,
    page_size: PageSize = PAGE_SIZE,
    page_token: PageToken = "",
    filter_text: FilterText = "",
) -> Response:
    """List losses of hosts, the newest first; filter by state, host."""
    query = parse(request, page_size=page_size, page_token=page_token, filter_text=filter_text, selector="", order_by="id desc")
    found, after = await runtime.context.db.read(lambda session: failover_view.page(session, query.page))
    return json_response(dump_list(FailoverResource, [render_failover(one) for one in found], query.next_token(after)))


@router.get("/v1/failovers/{failover}", response_model=FailoverResource)
async def get_failover(runtime: InRuntime, _access: FleetViewer, failover: FailoverPath) -> Response:
    """Show one loss: suspicion, evidence, proof and each vm's restart, with times."""
    view = await runtime.context.db.read(lambda session: failover_view.get(session, failover))
    return json_response(dump(render_failover(view)))


@router.get("/v1/failover", response_model=FailoverStatusResource)
async def get_status(runtime: InRuntime, _access: FleetViewer) -> Response:
    """Tell whether failover works, why not, and what it works on."""
    found = await runtime.context.db.read(failover_view.status)
    return json_response(dump(render_status(found, at=runtime.context.clock.now())))


@router.post("/v1/failover:pause", status_code=204, response_class=Response)
async def pause(request: Request, access: FleetOperator, asked: Asked) -> Response:
    """Fence nothing and start nothing elsewhere until it is resumed."""
    return await _set_paused(request, access, asked, is_paused=True)


@router.post("/v1/failover:resume", status_code=204, response_class=Response)
async def resume(request: Request, access: FleetOperator, asked: Asked) -> Response:
    """Work again; every host gets a full window first."""
    return await _set_paused(request, access, asked, is_paused=False)


async def _set_paused(request: Request, access: Access, asked: Asked, *, is_paused: bool) -> Response:
    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        recovery.set_paused(session, is_paused, actor=actor, now=now)
        return NO_CONTENT

    verb = "failover.pause" if is_paused else "failover.resume"
    return await mutate(Order(request=request, access=access, wish=asked, verb=verb), work)


@router.post("/v1/failover:trust-database", status_code=204, response_class=Response)
async def trust_database(request: Request, access: FleetAdmin, body: ReasonBody, asked: Asked) -> Response:
    """Take your word that the database is not older than the fleet, whatever hosts say: everything is changed again."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        behind.trust(session, reason=body.reason, actor=actor, now=now)
        return NO_CONTENT

    order = Order(request=request, access=access, wish=asked, verb="database.trust", body=body, ends_behind=True)
    return await mutate(order, work)


@router.post("/v1/hosts/{name}:release", status_code=204, response_class=Response)
async def release_host(request: Request, access: FleetAdmin, name: NamePath, body: ReasonBody, asked: Asked) -> Response:
    """Fence and recover this host although failover is frozen."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        recovery.release(session, hosts_admin.find(session, name), reason=body.reason, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="host.release", body=body), work)


@router.post("/v1/hosts/{name}:confirm-off", status_code=204, response_class=Response)
async def confirm_off(request: Request, access: FleetAdmin, name: NamePath, body: ReasonBody, asked: Asked) -> Response:
    """Take your word that the host is off: its vms start elsewhere. Refused while it is heard from."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        recovery.confirm_off(session, hosts_admin.find(session, name), reason=body.reason, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="host.confirm_off", body=body), work)


@router.get("/v1/hosts/{name}/loss-drill", response_model=DrillResource)
async def drill_host_loss(runtime: InRuntime, _access: FleetViewer, name: NamePath, boot_s: BootSeconds = 5.0) -> Response:
    """Play the loss of this host by failover's own core on a copy of the fleet: when each vm would run again, and which would not."""
    now, assumptions = runtime.context.clock.now(), Assumptions(boot_s=boot_s)
    inputs, found = await _foresee(runtime, name, assumptions)
    names = {vm.id: vm.name for vm in inputs.vms.values()}
    return json_response(dump(render_drill(found, host=inputs.lost.name, names=names, assumptions=assumptions, at=now)))


async def _foresee(runtime: Runtime, name: str, assumptions: Assumptions) -> tuple[drills.Inputs, Drill]:
    """Play the loss of the host; seconds of arithmetic on a large fleet: not on the event loop, and in no transaction."""
    context = runtime.context
    now = context.clock.now()

    def read(session: Session) -> drills.Inputs:
        return drills.read(session, hosts_admin.find(session, name), survival.read(session, now=now))

    inputs = await context.db.read(read)
    settings = FailoverSettings(lease_ttl_s=context.settings.lease_ttl_s)
    return inputs, await asyncio.to_thread(drills.host_loss, inputs, settings=settings, assumptions=assumptions)


class CutPowerBody(Body):
    """`confirm` is the host's name once more; `force` also where vms would not run again."""

    confirm: Annotated[str, Field(min_length=1, max_length=63, examples=["node2"])]
    force: bool = False


@router.post("/v1/hosts/{name}:cut-power", status_code=204, response_class=Response)
async def cut_power(
    request: Request, runtime: InRuntime, access: FleetAdmin, name: NamePath, body: CutPowerBody, asked: Asked
) -> Response:
    """Cut the host's power by its power device, for a drill. Refused where a vm of it would not run again."""
    foreseen: tuple[drills.Inputs, Drill] | None = None
    with contextlib.suppress(TrimtabError):  # told below, where refusals are recorded
        foreseen = await _foresee(runtime, name, Assumptions())

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        inputs = (
            foreseen[0] if foreseen else drills.read(session, hosts_admin.find(session, name), survival.read(session, now=now))
        )
        settings = FailoverSettings(lease_ttl_s=runtime.context.settings.lease_ttl_s)
        drill = foreseen[1] if foreseen else drills.host_loss(inputs, settings=settings)
        drills.cut_power(session, inputs, drill, confirm=body.confirm, force=body.force, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="host.cut_power", body=body), work)


# --- power devices -----------------------------------------------------------------------------------------------------------


@router.get("/v1/fence-paths", response_model=FencePathsResource)
async def list_fence_paths(runtime: InRuntime, _access: FleetViewer) -> Response:
    """List the power devices of all hosts with their last tests."""
    found = await runtime.context.db.read(fencing.everywhere)
    return json_response(dump(render_paths(found, at=runtime.context.clock.now())))


@router.post("/v1/fence-paths:test", status_code=202, response_model=FencePathsResource)
async def test_fence_paths(request: Request, access: FleetOperator, asked: Asked) -> Response:
    """Ask every power device for its status; never a power action. The answers appear in the list within seconds."""

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        return answered(render_paths(fencing.ask_for_test(session, None, now=now), at=now), status=202)

    return await mutate(Order(request=request, access=access, wish=asked, verb="fence.test"), work)


@router.get("/v1/hosts/{name}/fence-paths", response_model=FencePathsResource)
async def get_fence_paths(runtime: InRuntime, _access: FleetViewer, name: NamePath) -> Response:
    found = await runtime.context.db.read(lambda session: fencing.of_host(session, hosts_admin.find(session, name)))
    return json_response(dump(render_paths(found, at=runtime.context.clock.now())))


@router.put("/v1/hosts/{name}/fence-paths", response_model=FencePathsResource)
async def set_fence_paths(
    request: Request, runtime: InRuntime, access: FleetAdmin, name: NamePath, body: FencePathsBody, asked: Asked
) -> Response:
    """Replace a host's power devices; they are tested at once."""
    box = runtime.context.secrets

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        host = hosts_admin.find(session, name)
        paths = [one.path() for one in body.paths]
        return answered(render_paths(fencing.configure(session, host, paths, box=box, actor=actor, now=now), at=now))

    return await mutate(Order(request=request, access=access, wish=asked, verb="fence.config", body=body), work)


@router.post("/v1/hosts/{name}:test-fence", status_code=202, response_model=FencePathsResource)
async def test_fence(request: Request, access: FleetOperator, name: NamePath, asked: Asked) -> Response:
    """Ask the host's power devices for their status; never a power action."""

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        return answered(render_paths(fencing.ask_for_test(session, hosts_admin.find(session, name), now=now), at=now), status=202)

    return await mutate(Order(request=request, access=access, wish=asked, verb="fence.test"), work)
