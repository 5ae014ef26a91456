"""Hosts, their classes, and the tokens with which machines join."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import (
    Body,
    Bool,
    CpuClassName,
    CpuModel,
    HostName,
    LabelChanges,
    LabelKey,
    LabelValue,
    Name,
    Part,
    Ref,
    RefOrNone,
    ResourceCount,
)
from trimtab_controller.api.mutate import NO_CONTENT, Order, accepted, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.hosts import (
    HostClassResource,
    HostResource,
    HostTokenResource,
    NewHostTokenResource,
    render_class,
    render_host,
    render_host_token,
    render_new_host_token,
)
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import requires
from trimtab_controller.core.guest_resources import LIMIT_MAX_PERCENT, LIMIT_MIN_PERCENT, WEIGHT_MAX
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.core.placement.policies import policy_named
from trimtab_controller.services import host_reboots, hosts, hosts_admin
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_controller.store import host_tokens, hosts_read
from trimtab_protos.errors import InvalidRequest

router = APIRouter(tags=["hosts"])
FleetViewer = Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]
FleetOperator = Annotated[Access, requires(Role.OPERATOR, Scope.FLEET)]
FleetAdmin = Annotated[Access, requires(Role.ADMIN, Scope.FLEET)]
JoinTokenPath = Annotated[str, Path(pattern=r"^join-[0-9a-z]{26}$", examples=["join-01hf7y2m3n4p5q6r7s8t9v0wxy"])]
Permille = Annotated[int, Field(strict=True, ge=100, le=100_000, examples=[4000])]


class TaintBody(Part):
    """`refuse` keeps vms off that do not tolerate it; `avoid` places them there only where nothing else is as good."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"effect": "refuse"}]})

    value: LabelValue = ""
    effect: Literal["refuse", "avoid"] = "refuse"


class HostChanges(Body):
    """A field left out stays as it is; taints and labels are merged in by key, null takes one away."""

    name: HostName | None = None
    host_class: Ref | None = None
    labels: LabelChanges | None = None
    taints: Annotated[dict[LabelKey, TaintBody | None], Field(max_length=32, examples=[{"gpu": {"effect": "refuse"}}])] | None = (
        None
    )
    # What operators count there; 0 takes it away.
    resources: Annotated[dict[LabelKey, ResourceCount], Field(max_length=32, examples=[{"licence": 4}])] | None = None
    # Only this project's vms are placed there from now on; '' for any.
    exclusive_project: RefOrNone | None = None
    # Cpus kept for vms with dedicated ones; '' gives them back.
    dedicated_cpus: Annotated[str, Field(max_length=400, pattern=r"^[0-9,-]*$", examples=["4-15,20"])] | None = None

    def change(self) -> hosts_admin.HostChange:
        taints = None
        if self.taints is not None:
            taints = {key: (one.value, one.effect) if one else None for key, one in self.taints.items()}
        return hosts_admin.HostChange(
            name=self.name,
            host_class=self.host_class,
            labels=self.labels,
            taints=taints,
            resources=self.resources,
            exclusive_project=self.exclusive_project,
            dedicated_cpus=self.dedicated_cpus,
        )


class HostTokenBody(Body):
    name: HostName
    rejoin: Bool = False


class CpuClassBody(Part):
    """`weight`: share of cpu time where the host has too little, 100 as a vm without a class. `limit_percent`: most cpu time of each
    vcpu, in percent of one cpu; 0: no bound."""

    weight: Annotated[int, Field(strict=True, ge=1, le=WEIGHT_MAX, examples=[50])]
    limit_percent: Annotated[int, Field(strict=True, ge=0, le=LIMIT_MAX_PERCENT, examples=[50])] = 0


class HostClassChanges(Body):
    """A field left out stays as it is; cpu_model and machine null are derived from the members again."""

    cpu_model: CpuModel | None = None
    machine: Annotated[str, Field(pattern=r"^pc-(q35|i440fx)-[0-9]{1,3}\.[0-9]{1,3}$", examples=["pc-q35-7.2"])] | None = None
    vcpu_ratio_permille: Permille = 4000
    memory_ratio_permille: Annotated[int, Field(strict=True, ge=100, le=10_000, examples=[1000])] = 1000
    memory_reserve_mib: Annotated[int, Field(strict=True, ge=0, le=1 << 24, examples=[1024])] = 1024
    policy: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$", examples=["best-fit"])] = "best-fit"
    # one-host-loss: no vm is accepted that could not be restarted, or that would keep another from it, after the loss of one host.
    admission: Literal["any", "one-host-loss"] = "any"
    # What classes of cpu time mean on its hosts; one that is missing means what it means anywhere. Together, not one by one.
    cpu_classes: dict[CpuClassName, CpuClassBody] = Field(default_factory=dict, max_length=3, examples=[{"low": {"weight": 50}}])

    def given(self) -> dict[str, Any]:
        """Return what was given, by column. InvalidRequest for a policy that is none."""
        values = {name: getattr(self, name) for name in self.model_fields_set - {"request_id", "name"}}
        if "cpu_classes" in values:
            values["cpu_classes"] = _cpu_classes(self.cpu_classes)
        if "policy" in values:
            policy_named(values["policy"])
        return values


def _cpu_classes(given: Mapping[str, CpuClassBody]) -> dict[str, dict[str, int]]:
    for name, one in given.items():
        if 0 < one.limit_percent < LIMIT_MIN_PERCENT:
            field = f"cpu_classes.{name}.limit_percent"
            message = f"{field}: 0 for no bound, or at least {LIMIT_MIN_PERCENT}, not {one.limit_percent}"
            raise InvalidRequest("limit-too-low", message, field=field)
    return {name: {"weight": one.weight, "limit_percent": one.limit_percent} for name, one in given.items()}


class HostClassBody(HostClassChanges):
    name: Name


@router.get("/v1/hosts", response_model=ListOf[HostResource])
async def list_hosts(runtime: InRuntime, _access: FleetViewer, query: Listing) -> Response:
    """List hosts; filter by name, connectivity, host_class, is_cordoned."""
    now, heard = runtime.context.clock.now(), runtime.context.heard()
    found, after = await runtime.context.db.read(lambda session: hosts_admin.page(session, query.page, now=now))
    items = [render_host(view, now=now, heard=heard, is_full=False) for view in found]
    return json_response(dump_list(HostResource, items, query.next_token(after)))


@router.get("/v1/hosts/{name}", response_model=HostResource)
async def get_host(runtime: InRuntime, _access: FleetViewer, name: NamePath) -> Response:
    now = runtime.context.clock.now()
    view = await runtime.context.db.read(lambda session: hosts_admin.get(session, name, now=now))
    return json_response(dump(_shown(runtime, view)), etag=etag_of(view.host.version))


@router.patch("/v1/hosts/{name}", response_model=HostResource)
async def change_host(
    request: Request, runtime: InRuntime, access: FleetAdmin, name: NamePath, body: HostChanges, asked: Asked
) -> Response:
    """Rename a host, merge labels and taints in (null takes one away), say what it has, or move it to another class."""
    order = Order(request=request, access=access, wish=asked, verb="host.change", body=body)
    return await _change(runtime, order, name, body.change())


@router.post("/v1/hosts/{name}:cordon", response_model=HostResource)
async def cordon_host(request: Request, runtime: InRuntime, access: FleetOperator, name: NamePath, asked: Asked) -> Response:
    """Take no new placements on the host; what runs there stays."""
    order = Order(request=request, access=access, wish=asked, verb="host.cordon")
    return await _change(runtime, order, name, hosts_admin.HostChange(is_cordoned=True))


@router.post("/v1/hosts/{name}:uncordon", response_model=HostResource)
async def uncordon_host(request: Request, runtime: InRuntime, access: FleetOperator, name: NamePath, asked: Asked) -> Response:
    order = Order(request=request, access=access, wish=asked, verb="host.uncordon")
    return await _change(runtime, order, name, hosts_admin.HostChange(is_cordoned=False))


@router.delete("/v1/hosts/{name}", status_code=202, response_model=OperationAnswer)
async def remove_host(
    request: Request,
    access: FleetAdmin,
    name: NamePath,
    asked: Asked,
    keep_guests: Annotated[bool, Query(description="Leave its vms behind as plain libvirt domains.")] = False,
    force: Annotated[bool, Query(description="Also where the host does not answer: nothing is undone on it.")] = False,
) -> Response:
    """Take a host out of the fleet and undo what the join changed on it."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = hosts_admin.remove(
            session, name, keep_guests=keep_guests, force=force, expected_version=asked.if_match, actor=actor, now=now
        )
        return accepted(OperationAnswer(operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="host.remove"), work)


@router.post("/v1/hosts/{name}:reboot", status_code=202, response_model=OperationAnswer)
async def reboot_host(
    request: Request,
    access: FleetOperator,
    name: NamePath,
    asked: Asked,
    force: Annotated[
        bool, Query(description="Stop the vms that it has, and start them again, instead of moving them away.")
    ] = False,
) -> Response:
    """Empty the host, let it restart, and take vms again once it is back."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = host_reboots.reboot(session, hosts_admin.find(session, name), force=force, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="host.reboot"), work)


async def _change(runtime: Runtime, order: Order, name: str, change: hosts_admin.HostChange) -> Response:
    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = hosts_admin.change(session, name, change, expected_version=order.wish.if_match, actor=actor, now=now)
        return answered(_shown(runtime, view), version=view.host.version)

    return await mutate(order, work)


def _shown(runtime: Runtime, view: hosts_admin.HostView) -> HostResource:
    context = runtime.context
    state = context.host_states().get(view.host.id)
    return render_host(view, now=context.clock.now(), heard=context.heard(), is_full=True, state=state)


# --- join tokens -----------------------------------------------------------------------------------------------------------


@router.get("/v1/host-tokens", response_model=ListOf[HostTokenResource])
async def list_host_tokens(runtime: InRuntime, _access: FleetAdmin, query: Listing) -> Response:
    """List join tokens that can still be used."""
    now = runtime.context.clock.now()
    found, after = await runtime.context.db.read(lambda session: hosts_read.tokens_page(session, query.page, now=now))
    return json_response(dump_list(HostTokenResource, [render_host_token(one) for one in found], query.next_token(after)))


@router.post("/v1/host-tokens", status_code=201, response_model=NewHostTokenResource)
async def create_host_token(
    request: Request, runtime: InRuntime, access: FleetAdmin, body: HostTokenBody, asked: Asked
) -> Response:
    """Make a one-use token and the one line to paste on the new host."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        place = runtime.context.join_place()
        issued = hosts.create_token(session, body.name, actor, now, place=place, is_rejoin=body.rejoin)
        return answered(
            render_new_host_token(issued, with_secret=True),
            status=201,
            stored=render_new_host_token(issued, with_secret=False),
        )

    order = Order(request=request, access=access, wish=asked, verb="host_token.create", body=body, name=body.name)
    return await mutate(order, work)


@router.delete("/v1/host-tokens/{token}", status_code=204, response_class=Response)
async def delete_host_token(request: Request, access: FleetAdmin, token: JoinTokenPath, asked: Asked) -> Response:
    def work(session: Session, _actor: Actor, _now: datetime) -> Answer:
        host_tokens.delete(session, token)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="host_token.delete"), work)


# --- checks ----------------------------------------------------------------------------------------------------------------


class HostCheckBody(Body):
    """'' looks at all hosts; else at all ways from and to one."""

    host: RefOrNone = ""


@router.post("/v1/hosts:check", status_code=202, response_model=OperationAnswer)
async def check_hosts(request: Request, access: FleetOperator, body: HostCheckBody, asked: Asked) -> Response:
    """Have hosts look at the ways to each other: ports, TLS, MTU, rate, clocks. The operation's result names what is wrong."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        return accepted(
            OperationAnswer(operation=render(hosts_admin.check(session, body.host, actor=actor, now=now), project_name=""))
        )

    return await mutate(Order(request=request, access=access, wish=asked, verb="host.check", body=body), work)


# --- classes ---------------------------------------------------------------------------------------------------------------


@router.get("/v1/host-classes", response_model=ListOf[HostClassResource])
async def list_host_classes(runtime: InRuntime, _access: FleetViewer, query: Listing) -> Response:
    found, after = await runtime.context.db.read(lambda session: hosts_read.classes_page(session, query.page))
    return json_response(dump_list(HostClassResource, [render_class(one) for one in found], query.next_token(after)))


@router.post("/v1/host-classes", status_code=201, response_model=HostClassResource)
async def create_host_class(request: Request, access: FleetAdmin, body: HostClassBody, asked: Asked) -> Response:
    values = body.given()

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        made = hosts_admin.create_class(session, name=body.name, values=values, actor=actor, now=now)
        return answered(render_class(made), status=201, version=made.version)

    order = Order(request=request, access=access, wish=asked, verb="host_class.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/host-classes/{name}", response_model=HostClassResource)
async def get_host_class(runtime: InRuntime, _access: FleetViewer, name: NamePath) -> Response:
    found = await runtime.context.db.read(lambda session: hosts_admin.find_class(session, name))
    return json_response(dump(render_class(found)), etag=etag_of(found.version))


@router.patch("/v1/host-classes/{name}", response_model=HostClassResource)
async def change_host_class(
    request: Request, access: FleetAdmin, name: NamePath, body: HostClassChanges, asked: Asked
) -> Response:
    values = body.given()

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        changed = hosts_admin.change_class(session, name, values, expected_version=asked.if_match, actor=actor, now=now)
        return answered(render_class(changed), version=changed.version)

    return await mutate(Order(request=request, access=access, wish=asked, verb="host_class.change", body=body), work)


@router.delete("/v1/host-classes/{name}", status_code=204, response_class=Response)
async def delete_host_class(request: Request, access: FleetAdmin, name: NamePath, asked: Asked) -> Response:
    """Delete a class without hosts."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        hosts_admin.delete_class(session, name, expected_version=asked.if_match, actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="host_class.delete"), work)
