"""Plans: made, reviewed, applied, called off; maintenance of hosts; failover coverage and capacity."""

import asyncio
import re
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import LABEL_KEY_PATTERN, Body, HostName, Labels, MemoryMib, RefOrNone, Vcpus
from trimtab_controller.api.lists import PAGE_SIZE, FilterText, PageSize, PageToken, SelectorText, parse, parse_pairs
from trimtab_controller.api.mutate import NO_CONTENT, Order, accepted, answered, mutate, prepared
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.plans import (
    CapacityResource,
    CoverageResource,
    FitResource,
    MaintenanceAnswer,
    PlanResource,
    render_capacity,
    render_coverage,
    render_fit,
    render_plan,
)
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.core.planning import Estate, PlanKind
from trimtab_controller.core.planning.capacity import Shape
from trimtab_controller.services import hosts_admin, lost_disks, plans, survival
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_controller.services.plans import PlanWish
from trimtab_controller.services.survival import FitWish
from trimtab_protos.errors import InvalidRequest

router = APIRouter(tags=["plans"])
FleetViewer = Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]
FleetOperator = Annotated[Access, requires(Role.OPERATOR, Scope.FLEET)]
PlanPath = Annotated[str, Path(pattern=r"^plan-[0-9a-z]{26}$", examples=["plan-01hf7y2m3n4p5q6r7s8t9v0wxy"])]
PlanRef = Annotated[str, Field(pattern=r"^(plan-[0-9a-z]{26})?$", max_length=40, examples=["plan-01hf7y2m3n4p5q6r7s8t9v0wxy"])]
Kinds = Annotated[
    str,
    Query(
        max_length=500,
        pattern=r"^[A-Za-z0-9._/,-]*$",
        examples=["host,rack"],
        description="Kinds of domains, a comma list: host, pool, or keys of labels.",
    ),
]
OneLabel = Annotated[str, Query(max_length=63, pattern=f"({LABEL_KEY_PATTERN})|^$", examples=["zone"])]
_ADDED = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})c/([1-9][0-9]{0,5})(GiB|TiB)")


class PlanBody(Body):
    """`hosts` and `labels` for drain, evacuate and upgrade; `pool` for drain-pool; `plan` for undo."""

    kind: Literal["drain", "rebalance", "consolidate", "evacuate", "upgrade", "drain-pool", "undo"]
    hosts: Annotated[list[HostName], Field(max_length=1000, examples=[["node3"]])] = Field(default_factory=list)
    labels: Labels = Field(default_factory=dict)
    deadline_s: Annotated[int, Field(strict=True, ge=1, le=30 * 86400, examples=[3600])] | None = None
    max_moves: Annotated[int, Field(strict=True, ge=1, le=100_000, examples=[50])] | None = None
    plan: PlanRef = ""
    pool: RefOrNone = ""

    def wish(self) -> PlanWish:
        """Return the wish. InvalidRequest for an undo of nothing."""
        if (self.kind == "undo") != bool(self.plan):
            raise InvalidRequest("plan-field", "plan: given for kind undo, and for no other", field="plan")
        if (self.kind == "drain-pool") != bool(self.pool):
            raise InvalidRequest("pool-field", "pool: given for kind drain-pool, and for no other", field="pool")
        return PlanWish(
            kind=PlanKind(self.kind),
            hosts=tuple(self.hosts),
            labels=self.labels,
            deadline_s=self.deadline_s,
            max_moves=self.max_moves,
            plan_id=self.plan,
            pool=self.pool,
        )


@router.get("/v1/plans", response_model=ListOf[PlanResource])
async def list_plans(
    request: Request,
    runtime: InRuntime,
    _access: FleetViewer,
    page_size: PageSize = PAGE_SIZE,
    page_token: PageToken = "",
    filter_text: FilterText = "",
) -> Response:
    """List plans, newest first; filter by kind, state, created_by."""
    query = parse(request, page_size=page_size, page_token=page_token, filter_text=filter_text, selector="", order_by="id desc")
    found, after = await runtime.context.db.read(lambda session: plans.page(session, query.page))
    return json_response(dump_list(PlanResource, [render_plan(one) for one in found], query.next_token(after)))


@router.post("/v1/plans", status_code=201, response_model=PlanResource)
async def create_plan(request: Request, runtime: InRuntime, access: FleetOperator, body: PlanBody, asked: Asked) -> Response:
    """Make a plan and keep it for review; with validate_only it is shown and not kept."""
    wish, now = body.wish(), runtime.context.clock.now()
    order = Order(request=request, access=access, wish=asked, verb="plan.create", body=body)
    inputs = await prepared(order, runtime.context.db.read(lambda session: plans.gather(session, wish, now=now)))
    # Seconds for a large fleet: not on the event loop, and in no transaction.
    plan = await asyncio.to_thread(plans.decide, inputs)

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        return answered(render_plan(plans.keep(session, plan, actor=actor, now=now)), status=201)

    return await mutate(order, work)


@router.get("/v1/plans/{plan}", response_model=PlanResource)
async def get_plan(runtime: InRuntime, _access: FleetViewer, plan: PlanPath) -> Response:
    view = await runtime.context.db.read(lambda session: plans.get(session, plan))
    return json_response(dump(render_plan(view)))


@router.post("/v1/plans/{plan}:apply", status_code=202, response_model=OperationAnswer)
async def apply_plan(request: Request, access: FleetOperator, plan: PlanPath, asked: Asked) -> Response:
    """Carry the plan out; refused where the fleet changed in a way that matters since it was made."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = plans.apply(session, plan, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="plan.apply"), work)


@router.post("/v1/plans/{plan}:cancel", status_code=202, response_model=OperationAnswer)
async def cancel_plan(request: Request, access: FleetOperator, plan: PlanPath, asked: Asked) -> Response:
    """Call off what is under way; what has moved stays where it is."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = plans.cancel(session, plan, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="plan.cancel"), work)


@router.delete("/v1/plans/{plan}", status_code=204, response_class=Response)
async def delete_plan(request: Request, access: FleetOperator, plan: PlanPath, asked: Asked) -> Response:
    """Forget a plan that is not under way."""

    def work(session: Session, _actor: Actor, _now: datetime) -> Answer:
        plans.delete(session, plan)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="plan.delete"), work)


# --- maintenance -------------------------------------------------------------------------------------------------------------


@router.post("/v1/hosts/{name}:start-maintenance", status_code=202, response_model=MaintenanceAnswer)
async def start_maintenance(request: Request, access: FleetOperator, name: NamePath, asked: Asked) -> Response:
    """Cordon and drain the host, and hold it so until the maintenance is ended."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        host = hosts_admin.find(session, name)
        view, operation = plans.begin_maintenance(session, host, actor=actor, now=now)
        return accepted(MaintenanceAnswer(operation=render(operation, project_name=""), plan=render_plan(view)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="host.start_maintenance"), work)


@router.post("/v1/hosts/{name}:end-maintenance", status_code=204, response_class=Response)
async def end_maintenance(request: Request, access: FleetOperator, name: NamePath, asked: Asked) -> Response:
    """Let the host take vms again, unless it was cordoned before."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        plans.end_maintenance(session, hosts_admin.find(session, name), actor=actor, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="host.end_maintenance"), work)


# --- what would be left --------------------------------------------------------------------------------------------------------


@router.get("/v1/failover-coverage", response_model=CoverageResource)
async def get_coverage(
    runtime: InRuntime, _access: FleetViewer, by: Kinds = "", selector: SelectorText = "", vms: bool = False
) -> Response:
    """Tell for each failure domain which vms the rest of the fleet could not restart, and what vms on local disks would lose.

    With `vms` every vm that runs is told of: covered or not, and why.
    """
    labels, now = parse_pairs(selector, field="selector"), runtime.context.clock.now()
    estate, stakes = await runtime.context.db.read(
        lambda session: (survival.read(session, now=now), lost_disks.at_stake(session, now=now))
    )
    kinds = tuple(filter(None, by.split(",")))
    found = await asyncio.to_thread(survival.coverage, estate, kinds=kinds, labels=labels, by_vm=vms)
    return json_response(dump(render_coverage(found, stakes, at=now)))


@router.get("/v1/capacity", response_model=CapacityResource)
async def get_capacity(runtime: InRuntime, _access: FleetViewer, by: OneLabel = "") -> Response:
    """Tell what there is, what is claimed, used, free and stranded, in all or by a label."""
    now = runtime.context.clock.now()
    estate = await runtime.context.db.read(lambda session: survival.read(session, now=now))
    found = await asyncio.to_thread(survival.capacity, estate, by=by)
    return json_response(dump(render_capacity(found, at=now)))


class FitBody(Body):
    """What is to fit, and what is thought away or in. Changes nothing."""

    vcpus: Vcpus
    memory_mib: MemoryMib
    host_selector: Labels = Field(default_factory=dict)
    without: Annotated[list[HostName], Field(max_length=1000, examples=[["node3"]])] = Field(default_factory=list)
    add: Annotated[
        list[
            Annotated[
                str, Field(pattern=r"^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}c/[1-9][0-9]{0,5}(GiB|TiB)$", examples=["2x64c/256GiB"])
            ]
        ],
        Field(max_length=16, examples=[["2x64c/256GiB"]]),
    ] = Field(default_factory=list)
    keep_free_hosts: Annotated[int, Field(strict=True, ge=0, le=1, examples=[1])] = 0

    def wish(self) -> FitWish:
        return FitWish(
            vcpus=self.vcpus,
            memory_mib=self.memory_mib,
            host_selector=self.host_selector,
            without=tuple(self.without),
            add=tuple(shape for text in self.add for shape in _shapes(text)),
            keep_free_hosts=self.keep_free_hosts,
        )


def _shapes(text: str) -> list[Shape]:
    found = _ADDED.fullmatch(text)
    assert found is not None, "the field's pattern is the same"
    count, cores, size = int(found[1]), int(found[2]), int(found[3])
    if count > 1000:
        raise InvalidRequest("add-too-many", "add: at most 1000 hosts at once, for example 2x64c/256GiB", field="add")
    return [Shape(cores, size << (10 if found[4] == "GiB" else 20))] * count


@router.post("/v1/capacity:fit", response_model=FitResource)
async def fit_capacity(runtime: InRuntime, _access: FleetViewer, body: FitBody) -> Response:
    """Tell how many more vms of a shape fit: now, without some hosts, with more, with one host's worth kept free."""
    wish, now = body.wish(), runtime.context.clock.now()

    def read(session: Session) -> tuple[Estate, tuple[str, ...]]:
        return survival.read(session, now=now), survival.resolve(session, wish)

    estate, without_ids = await runtime.context.db.read(read)
    found, largest = await asyncio.to_thread(survival.how_many, estate, wish, without_ids=without_ids)
    return json_response(dump(render_fit(found, largest, at=now)))
